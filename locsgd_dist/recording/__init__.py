"""The run directory and everything that is written into it while training.

    runs/NAME/
      config.yaml      the merged configuration
      metrics.jsonl    one JSON object per completed epoch
      events.jsonl     shift, frozen_layers, outputs, prune, batch, oom, collapse, resume, preempt, checkpoint,
                       bad_step, warning: one JSON object each
      memory.csv       the memory monitor's trace
      checkpoints/  plots/  tensorboard/  report.html

`Recorder` is the one interface: the trainer hands it each epoch's numbers once, and it passes them to the
files, the console, TensorBoard and the report. Only rank 0 has sinks; on the others every call is a no-op.
"""

from locsgd_dist.recording.config import RunConfig, check_run
from locsgd_dist.recording.directory import RunDirectory, read_jsonl, write_atomically
from locsgd_dist.recording.recorder import Recorder
from locsgd_dist.recording.sinks import Sink

__all__ = ["Recorder", "RunConfig", "RunDirectory", "Sink", "check_run", "read_jsonl", "write_atomically"]
