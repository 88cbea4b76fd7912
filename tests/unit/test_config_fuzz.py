"""Bad configurations by the hundred: each ends in one line that names what is wrong and exit code 2, never a traceback.

What is bad is told by the documentation of the keys (their types, and the ranges in their help texts), not by the code
that checks them.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from locsgd_dist.config import Config, ConfigError, check_config, make_parser, parse_config
from locsgd_dist.train import main

KEYS = {action.dest: action for action in make_parser()._actions if "." in action.dest}
SECTIONS = sorted({key.partition(".")[0] for key in KEYS})
DEFAULTS = yaml.safe_load(Config().to_yaml())
#: Taken as text, whatever it says; what text is allowed is another test's business.
FREE_TEXT = {key for key in KEYS if isinstance(DEFAULTS[key.partition(".")[0]][key.partition(".")[2]], str)} - {
    key for key, action in KEYS.items() if "Literal" in str(action._typehint)
}
ALSO_TEXT = {"model.weights", "selection.trace", "batch.memory_budget"}
MAPPINGS = {"model.kwargs", "data.kwargs"}
TYPED = sorted(KEYS.keys() - FREE_TEXT - ALSO_TEXT - MAPPINGS)


def is_allowed(key: str, number: float) -> bool:
    """Whether the help text of ``key`` lets it be this number."""
    said = KEYS[key].help
    if found := re.search(r"\bin\s+([\[(])0,\s+1([\])])", said):
        above = number >= 0 if found[1] == "[" else number > 0
        return above and (number <= 1 if found[2] == "]" else number < 1)
    if found := re.search(r">= (\d)", said):
        return number >= int(found[1])
    return number > 0 if re.search(r"; > 0", said) else True


BOUNDED = sorted(key for key in KEYS if not is_allowed(key, -1.0) and key not in FREE_TEXT | ALSO_TEXT)


class Bad(NamedTuple):
    """A command line that must be refused; ``{folder}`` stands for a folder that holds ``files``."""

    arguments: list[str]
    named: str
    """Must occur in the line."""
    files: dict[str, bytes] = {}


RUBBISH = ["[", "{", "'", '"', "\n\tx: 1\n", "- a\n b: [", "\x00", "&", "*x", "!!", "%", "@", "|\n-"]
words = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
# Neither a number, nor true, nor null, nor an option of any key.
nonsense = st.one_of(
    words.map(lambda word: f"@{word}"),
    words.map(lambda word: f"{word} {word}"),
    st.lists(st.integers(), max_size=3).map(str),
    words.map(lambda word: f"{{{word}: 1}}"),
    st.text(min_size=1, max_size=8).map(lambda text: f"<{text}"),
    st.just("'"),
    st.just("1e"),
    st.just("[" * 40),
    st.just("é\u2028\x1b[31m"),
    st.just("x\ny: z"),
)


def in_a_file(key: str, value: object) -> Bad:
    section, _, name = key.partition(".")
    return Bad(["--config", "{folder}/a.yaml"], key, {"a.yaml": yaml.safe_dump({section: {name: value}}).encode()})


@st.composite
def wrong_types(draw: st.DrawFn) -> Bad:
    key = draw(st.sampled_from(TYPED))
    value = draw(nonsense)
    if draw(st.booleans()):
        return Bad([f"--{key}={value}"], key)
    values: list[object] = [[1, [2]], {"a": {"b": None}}, "@x", b"\x00\xff", [], {}]
    return in_a_file(key, draw(st.sampled_from(values)))


@st.composite
def out_of_range(draw: st.DrawFn) -> Bad:
    key = draw(st.sampled_from(BOUNDED))
    whole = "float" not in str(KEYS[key]._typehint)
    numbers = st.integers(-(10**30), 10**30) if whole else st.floats(width=64)
    edges = st.sampled_from([0, -1, 1, 2, -0.5, 1.5] if not whole else [0, -1, 1])
    number = draw(st.one_of(numbers, edges))
    assume(not is_allowed(key, number) or math.isnan(number))
    if draw(st.booleans()):
        return Bad([f"--{key}={number}"], key)
    return in_a_file(key, number)


@st.composite
def unknown_keys(draw: st.DrawFn) -> Bad:
    known = draw(st.sampled_from(sorted(KEYS)))
    section, _, name = known.partition(".")
    word = draw(words)
    name = draw(st.sampled_from([name + word[0], word, name[1:] or "x", name + ".more"]))
    section = draw(st.sampled_from([section, section, word]))
    key = f"{section}.{name}"
    assume(key not in KEYS and name not in ("help", "print_config") and not key.startswith(("config", "help", "print")))
    # argparse takes what begins a key for that key; so does nobody read a wrong name into it in a file.
    if draw(st.booleans()):
        assume(not any(other.startswith(key) for other in KEYS))
        return Bad([f"--{key}={draw(st.integers())}"], name.partition(".")[0])
    content: object = {section: {name: draw(st.integers())}}
    return Bad(["--config", "{folder}/a.yaml"], name.partition(".")[0], {"a.yaml": yaml.safe_dump(content).encode()})


@st.composite
def wrong_sections(draw: st.DrawFn) -> Bad:
    section = draw(st.sampled_from(SECTIONS))
    value = draw(st.sampled_from([3, "text", [1, 2], True, [{"lr": 1}]]))
    if draw(st.booleans()):
        return Bad([f"--{section}={value}"], section)
    return Bad(["--config", "{folder}/a.yaml"], section, {"a.yaml": yaml.safe_dump({section: value}).encode()})


@st.composite
def broken_files(draw: st.DrawFn) -> Bad:
    good = yaml.safe_dump({"optim": {"lr": draw(st.floats(0.1, 1))}, "train": {"epochs": draw(st.integers(1, 9))}})
    at = draw(st.integers(0, len(good)))
    rubbish = draw(st.sampled_from(RUBBISH))
    text = good[:at] + rubbish + good[at:]
    try:
        yaml.safe_load(text)
        assume(False)
    except yaml.YAMLError:
        pass
    return Bad(["--config", "{folder}/a.yaml"], "", {"a.yaml": text.encode()})


@st.composite
def unusable_files(draw: st.DrawFn) -> Bad:
    name = draw(st.sampled_from(["a.yaml", "deep/er.yml", "ü ä.yaml", "no-ending"]))
    kind = draw(st.sampled_from(["missing", "a folder", "bytes", "a number", "a list", "text", "python", "recursion"]))
    content = {
        "bytes": draw(st.binary(min_size=1, max_size=40).map(lambda some: b"\xff\xfe\x00\x81" + some)),
        "a number": b"3\n",
        "a list": b"- optim\n- lr\n",
        "text": b"optim\n",
        "python": b"optim: !!python/object/apply:os.system ['touch executed']\n",
        "recursion": b"optim: &a\n  lr: *a\n",
    }
    if kind == "missing":
        return Bad(["--config", f"{{folder}}/{name}"], name)
    if kind == "a folder":
        return Bad([f"--config={{folder}}/{name}"], "", {f"{name}/inside": b""})
    return Bad(["--config", f"{{folder}}/{name}"], "", {name: content[kind]})


@st.composite
def broken_command_lines(draw: st.DrawFn) -> Bad:
    key = draw(st.sampled_from(TYPED))
    word = draw(words.filter(lambda word: word[0] != "h"))  # -h asks for help
    return draw(
        st.sampled_from(
            [
                Bad([word], word),
                Bad([f"--{key}"], key),
                Bad(["--config"], "config"),
                Bad(["--config="], "config"),
                Bad(["--config", f"x/{word}"], word),
                Bad([f"-{word}"], word),
                Bad([f"--{key}={{", word], ""),
                Bad([f"--{key}.{word}=1"], word),
                Bad([f"--{key}+=1"], key.partition(".")[0]),
            ]
        )
    )


bad_configurations = st.one_of(
    wrong_types(),
    wrong_types(),
    out_of_range(),
    out_of_range(),
    unknown_keys(),
    wrong_sections(),
    broken_files(),
    unusable_files(),
    broken_command_lines(),
)


@contextlib.contextmanager
def folder_with(files: dict[str, bytes]) -> Iterator[str]:
    """A folder that is also the working directory."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        yield folder


@settings(
    max_examples=500,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(bad_configurations)
def test_a_bad_configuration_is_one_line_and_exit_code_2(bad: Bad) -> None:
    with folder_with(bad.files) as folder:
        arguments = [argument.replace("{folder}", folder) for argument in bad.arguments]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            # So little to train that the test fails soon, should a bad one be taken.
            code = main(["--train.epochs=1", "--data.train_samples=20", *arguments])
        assert code == 2
        text = said.getvalue()
        assert text.startswith("locsgd: error: ")
        assert text.splitlines() == [text.removesuffix("\n")]
        assert len(text) < 1000
        assert not any(character < " " for character in text.removesuffix("\n"))
        assert "Traceback" not in text
        assert not re.search(r"<(class|function)|Namespace\(", text)
        assert bad.named in text
        assert not os.path.exists("executed")
        assert not os.path.exists("runs")


anything = st.one_of(
    nonsense,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "", ".inf", "-.inf", ".nan", "1e999", "9" * 400, "0x10", "1_000", "~", "1-1-1"]),
)


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(sorted(KEYS)), anything), min_size=1, max_size=3))
def test_any_values_at_all_are_taken_or_refused_in_one_line(chosen: list[tuple[str, str]]) -> None:
    with folder_with({}):
        said = ""
        try:
            check_config(parse_config([f"--{key}={value}" for key, value in chosen]))
        except ConfigError as error:
            said = str(error)
        assert len(said.splitlines()) == bool(said)
        assert not said or any(key in said for key, _ in chosen)


def test_the_documentation_says_what_is_bad() -> None:
    assert len(TYPED) > 60
    assert len(BOUNDED) > 30
    assert not is_allowed("optim.momentum", 1.0)
    assert is_allowed("optim.momentum", 0.0)
    assert is_allowed("optim.lr", 1e9)
    with pytest.raises(ConfigError, match=r"checkpoint\.keep"):
        parse_config(["--checkpoint.keep=0"])
