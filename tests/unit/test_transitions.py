"""What is recorded as layers are handed over, also by a run that does it again."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from localized_networks import vision_transformer

from locsgd_dist.localized import LocalizedLearner
from locsgd_dist.progress import Progress
from locsgd_dist.recording import Recorder, RunDirectory
from locsgd_dist.recording.sinks import JsonlSink
from locsgd_dist.transitions import Transitions


def hand_over(directory: RunDirectory, *, rule: str, resumes: bool) -> None:
    """All layers go over after the first epoch of 100 samples."""
    model, images = vision_transformer(), torch.zeros(2, 3, 32, 32)
    learner = LocalizedLearner(model, images, rule=rule)
    progress = Progress(torch.device("cpu"))
    progress.epoch, progress.samples_seen = 1, 100
    with Recorder([JsonlSink(directory)]) as recorder:
        if resumes:
            recorder.truncate_to(-1, samples_seen=100)  # behind the epoch's last sample, before its record
        Transitions(
            model,
            images,
            learner=learner,
            baseline=mock.Mock(),
            optimizer=mock.Mock(),
            region=mock.Mock(),
            replicas=mock.Mock(),
            kept=mock.Mock(**{"refresh.return_value": None}),
            recorder=recorder,
            progress=progress,
            is_compiled=False,
        ).move_boundary(len(learner.layers))


def test_layers_without_a_rule_are_named_once_however_often_the_hand_over_is_repeated(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    hand_over(directory, rule="hebbian", resumes=False)
    hand_over(directory, rule="hebbian", resumes=True)
    shift, frozen = directory.load_events()
    assert (shift["type"], frozen["type"]) == ("shift", "frozen_layers")
    assert frozen["message"].endswith(
        "encoder.layers.encoder_layer_0.self_attention, encoder.layers.encoder_layer_1.self_attention"
    )


def test_a_rule_that_updates_nothing_leaves_no_layer_out(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    hand_over(directory, rule="frozen", resumes=False)
    assert [event["type"] for event in directory.load_events()] == ["shift"]
