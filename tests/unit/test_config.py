"""The command line: what it merges, and that bad input is one line that names the key."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from locsgd_dist.config import ConfigError, check_config, packaged_configs, parse_config

KEEPING = (
    "--localized.keep_outputs=true --localized.rule=frozen --localized.norm_statistics=held --data.draws=4 "
    "--train.device=cpu"
)
BAD = [
    ("--optim.lr=abc", "optim.lr"),
    ("--optim.lr=nan", "optim.lr"),
    ("--optim.lr=0", "optim.lr"),
    ("--optim.foo=1", "optim.foo"),
    ("--optm.lr=1", "optm.lr"),
    ("--optim.name=adam", "optim.name"),
    ("--optim.nesterov=true --optim.momentum=0", "optim.nesterov"),
    ("--optim.ema_decay=1", "optim.ema_decay"),
    ("--selection.lmax=1.4", "selection.lmax"),
    ("--selection.alpha=0", "selection.alpha"),
    ("--selection.tshift=foo", "selection.tshift"),
    ("--selection.tshift=0", "selection.tshift"),
    ("--selection.kind=replay", "selection.trace"),
    ("--selection.kind=replay --selection.trace=missing.jsonl", "selection.trace"),
    ("--batch.per_gpu=0", "batch.per_gpu"),
    ("--batch.per_gpu=1.5", "batch.per_gpu"),
    ("--data.name=imagefolder --data.root=missing", "data.root"),
    ("--data.name=cifar10 --data.root=missing", "data.root"),
    ("--data.name=cifar11", "data.name"),
    ("--data.train_samples=1000000", "data.train_samples"),
    ("--model.name=resnet81", "model.name"),
    ("--model.name=torchvision:resnet51 --model.width=null", "model.name"),
    ("--model.weights=missing.pt", "model.weights"),
    ("--localized.rule=hebian", "localized.rule"),
    ("--localized.lr=-1", "localized.lr"),
    ("--localized.lr=.inf", "localized.lr"),
    ("--localized.alignment=1", "localized.alignment"),
    (f"--localized.refresh_every={'9' * 400}", "localized.refresh_every"),
    ("--localized.update_every=0", "localized.update_every"),
    ("--localized.alignment_every=-1", "localized.alignment_every"),
    ("--localized.weak_supervision=alignment", "localized.alignment_every"),
    ("--localized.weak_supervision=sometimes", "localized.weak_supervision"),
    ("--stochastic_depth.survival=0.5 --localized.alignment_every=2", "localized.alignment_every"),
    (
        "--selection.kind=linear --selection.full_at=0.5 --selection.start_epoch=60 --train.epochs=100",
        "selection.start_epoch",
    ),
    ("--localized.batch_fraction=0", "localized.batch_fraction"),
    ("--localized.norm_statistics=still", "localized.norm_statistics"),
    ("--data.draws=0", "data.draws"),
    ("--data.draws_from=-1", "data.draws_from"),
    ("--data.draws_from=3", "data.draws must be at least 1"),
    ("--localized.keep_gib=0", "localized.keep_gib"),
    ("--localized.keep_outputs=true", "localized.rule=frozen, got hebbian"),
    (KEEPING.replace("held", "moving"), "localized.norm_statistics=held, got moving"),
    (f"{KEEPING} --localized.refresh_every=4", "localized.refresh_every=0, got 4"),
    (f"{KEEPING} --localized.alignment_every=4", "localized.alignment_every=0, got 4"),
    (f"{KEEPING} --data.mixup_alpha=0.2", "data.mixup_alpha=0, got 0.2"),
    (f"{KEEPING} --data.cutmix_alpha=1", "data.cutmix_alpha=0, got 1"),
    (f"{KEEPING} --stochastic_depth.survival=0.5", "stochastic_depth.survival=1, got 0.5"),
    (f"{KEEPING} --pruning.every_epochs=1", "pruning.every_epochs=0, got 1"),
    (f"{KEEPING} --train.compile=true", "train.compile=false, got true"),
    (KEEPING.replace("--data.draws=4", ""), "data.draws, got null"),
    ("--stochastic_depth.survival=0", "stochastic_depth.survival"),
    ("--stochastic_depth.survival=0.5 --train.compile=true", "stochastic_depth.survival"),
    ("--stochastic_depth.survival=0.5 --pruning.every_epochs=1", "stochastic_depth.survival"),
    ("--stochastic_depth.survival=0.5 --localized.refresh_every=2", "localized.refresh_every"),
    ("--localized.refresh_carry=true --localized.refresh_every=1", "localized.refresh_every"),
    ("--localized.refresh_growth=0 --localized.refresh_every=1", "localized.refresh_growth"),
    ("--localized.refresh_growth=inf --localized.refresh_every=1", "localized.refresh_growth"),
    ("--localized.refresh_growth=1e308 --localized.refresh_every=100", "localized.refresh_growth"),
    ("--localized.refresh_growth=2", "localized.refresh_every"),
    ("--localized.refresh_carry=true --localized.refresh_every=2 --optim.name=adamw", "localized.refresh_carry"),
    ("--localized.refresh_carry=true --localized.refresh_every=2 --optim.momentum=0", "localized.refresh_carry"),
    ("--localized.refresh_carry=true --localized.refresh_every=2 --train.precision=fp16", "localized.refresh_carry"),
    ("--pruning.every_epochs=1 --localized.refresh_every=2", "localized.refresh_every"),
    ("--pruning.every_epochs=-1", "pruning.every_epochs"),
    ("--pruning.lasso_ratio=1", "pruning.lasso_ratio"),
    ("--pruning.threshold=0", "pruning.threshold"),
    ("--pruning.min_channels=0", "pruning.min_channels"),
    ("--replicas.mode=gossip", "replicas.mode"),
    ("--replicas.every=0", "replicas.every"),
    ("--train.epochs=0", "train.epochs"),
    ("--train.gradient_accumulation=0", "train.gradient_accumulation"),
    ("--train.deterministic=maybe", "train.deterministic"),
    ("--train.precision=fp16 --train.device=cpu", "train.precision"),
    ("--distributed.timeout_minutes=0", "distributed.timeout_minutes"),
    ("--distributed.bucket_mib=0", "distributed.bucket_mib"),
    ("--checkpoint.keep=0", "checkpoint.keep"),
    ("--run.dir=", "run.dir"),
    ("--run.resume=missing.pt", "run.resume: checkpoint missing.pt"),
    ("--faults.on_collapse=ignore", "faults.on_collapse"),
    ("--selection.criterion=norm", "selection.criterion"),
    ("--selection.anneal=true", "selection.anneal"),
    ("--config missing.yaml", "missing.yaml"),
    ("--config quickstrt", "quickstart"),
    ("stray", "stray"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_one_line_that_names_the_key(arguments: str, named: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_config(parse_config(arguments.split()))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "<class" not in str(caught.value)


def test_what_outputs_need_to_be_kept_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_config(parse_config(KEEPING.split()))


def test_momentum_may_be_carried_on_once_the_interval_has_grown():
    flags = ["--localized.refresh_carry=true", "--localized.refresh_every=1", "--optim.name=sgd"]
    parse_config([*flags, "--localized.refresh_growth=2"])
    with pytest.raises(ConfigError, match=r"^localized\.refresh_every must be >= 2"):
        parse_config([*flags, "--localized.refresh_growth=1.4"])


def test_unknown_key_in_a_file_is_named(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("optim:\n  lr: 0.1\n  momentun: 0.5\n")
    with pytest.raises(ConfigError, match=r"optim\.momentun.*did you mean optim\.momentum"):
        parse_config(["--config", str(file)])


def test_broken_yaml_is_one_line(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("optim: [\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", str(file)])
    assert "\n" not in str(caught.value)


def test_files_merge_in_order_and_later_overrides_win(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("optim:\n  lr: 0.1\n  momentum: 0.5\ntrain:\n  epochs: 7\n")
    second.write_text("optim:\n  lr: 5e-4\n")
    config = parse_config(["--config", str(first), "--config", str(second), "--train.epochs=9"])
    assert (config.optim.lr, config.optim.momentum, config.train.epochs) == (5e-4, 0.5, 9)


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = parse_config(["--selection.tshift=3", "--data.train_samples=100", "--model.kwargs={zero_init: true}"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert parse_config(["--config", str(file)]) == config


def test_without_config_the_packaged_quick_start_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config([])
    assert (config.data.name, config.model.name) == ("digits", "resnet18")
    assert parse_config(["--config", "quickstart"]) == parse_config(["--config=configs/quickstart.yaml"]) == config


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_configuration_parses(name: str):
    parse_config(["--config", name])


def test_print_config_shows_the_merged_result(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--optim.lr=0.125", "--print_config"])
    assert caught.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 0.125


def test_help_describes_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for line in parse_config([]).to_yaml().splitlines():
        key = line.strip().partition(":")[0]
        if line.startswith("  ") and not line.startswith("   "):
            assert f".{key} " in text or f".{key}\n" in text, key
    lines = [line.strip() for line in text.splitlines()]
    bare = re.compile(r"--[\w.]+( \S+)?")
    undocumented = [a for a, b in itertools.pairwise(lines) if bare.fullmatch(a) and b.startswith("(type:")]
    assert not undocumented


def test_configs_are_found_beside_the_package():
    import locsgd_dist

    assert (Path(locsgd_dist.__file__).parent / "configs" / "quickstart.yaml").is_file()
