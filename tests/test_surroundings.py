"""What a command's surroundings do to it: names of every kind, streams that fail, few characters, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import config_of, copy, digests, edit_json, everything, refused, run, tensors, write
from regroup.cli import app
from regroup.safe_text import visible
from test_safe_text import NAMES, by_bash

COMMAND = [sys.executable, "-m", "regroup.cli"]
REFERENCE = Path(__file__).parents[1] / "docs/cli.md"
# Names that a folder and a file can have.
POSSIBLE = [name for name in NAMES if name and "/" not in name and len(name) < 200]


SCORED = ("~", "a\nb", "[red]", "caf\udce9", "-n")


def called(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "COLUMNS": "80", **options.pop("env", {})}  # type: ignore[dict-item]
    call = [*COMMAND, *map(str, arguments)]
    return subprocess.run(call, stderr=subprocess.PIPE, check=False, timeout=120, env=environment, **options)  # type: ignore[call-overload]


def scripted(script: str) -> subprocess.CompletedProcess[bytes]:
    """Run a script that Ctrl-C reaches: a shell starts what it runs in the background with the signal ignored."""
    given = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{script}"
    return subprocess.run([sys.executable, "-c", given], capture_output=True, check=False, timeout=120)


def suggested(text: str) -> list[bytes]:
    """The words of the command that a message suggests, as a shell reads them."""
    return by_bash(re.findall(r"regroup (?:convert|evaluate) .*", text)[-1])


def meant(word: bytes) -> str:
    """The name of a file in the current folder that a shell's word stands for."""
    return os.fsdecode(word).removeprefix("./")


@pytest.mark.parametrize("name", POSSIBLE)
def test_names_of_folders_and_files(name: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb takes them, prints them as they are, and suggests commands that name them."""
    monkeypatch.chdir(tmp_path)
    given = f"./{name}" if name.startswith("-") else name
    copy(shop / "parent", tmp_path / name)
    status, out, message = run("inspect", given)
    assert status == 0, message
    assert out.split("\n")[0] == visible(given)
    output = f"o {name}"
    status, _, message = run("convert", given, output, "--kv-heads", 2, "--calibration", "none")
    assert status == 0, message
    assert f"wrote {visible(output)} in " in message
    words = suggested(message)
    assert words[:2] == [b"regroup", b"evaluate"]
    assert [meant(words[2]), words[3], meant(words[4]), *words[5:]] == [output, b"--teacher", name, b"--data", b"FILE"]
    if name in SCORED:
        score(given, words, f"{name}.jsonl", tmp_path)
    status, _, message = run("plan", given, "--kv-heads", 2, f"--output={name}.json")
    assert status == 0, message
    words = suggested(message)
    assert [meant(word) for word in words[2:]] == [name, "DST", "--plan", f"{name}.json"]
    missing = refused("evaluate", given, f"--data=no {name}", "--window", 16)
    assert f"file:     {visible('no ' + name)}" in missing


def score(given: str, words: list[bytes], data: str, tmp_path: Path) -> None:
    """Follow the suggestion, without the teacher; names that are not UTF-8 are more than safetensors takes."""
    (tmp_path / data).write_text('{"text": "%s"}\n' % ("to be or not to be " * 40), encoding="utf-8")
    status, _, message = run("evaluate", os.fsdecode(words[2]), "--window", 16, f"--data={data}")
    assert status == (2 if "\udce9" in given else 0), message
    assert "not valid UTF-8" in message or status == 0


def test_a_card_names_its_parent_as_it_is(shop: Path, tmp_path: Path) -> None:
    parent = copy(shop / "parent", tmp_path / "`<img src=x>` [y](z)\n# w")
    assert run("convert", parent, tmp_path / "child", "--kv-heads", 2, "--calibration", "none")[0] == 0
    card = (tmp_path / "child" / "README.md").read_text(encoding="utf-8")
    assert "Converted from `` `<img src=x>` [y](z)\\n# w `` by" in card
    assert "\n# w" not in card


def test_help_shows_brackets_and_the_name_of_the_command() -> None:
    shown = " ".join(CliRunner().invoke(app, ["plan", "--help"]).stdout.split())
    assert "[default: 65,536; of self 16,384] [x>=1]" in shown
    for verb in ("advise", "inspect", "bench decode"):
        assert f"Usage: regroup {verb} [OPTIONS]" in CliRunner().invoke(app, [*verb.split(), "--no-such"]).stderr


@pytest.mark.parametrize(
    "verb", ["--version", pytest.param("inspect", marks=pytest.mark.slow), pytest.param("json", marks=pytest.mark.slow)]
)
def test_results_that_cannot_be_written(verb: str, shop: Path) -> None:
    arguments = {"inspect": ["inspect", shop / "parent"], "json": ["inspect", shop / "parent", "--json"]}
    with Path("/dev/full").open("wb") as full:
        done = called(*arguments.get(verb, [verb]), stdout=full)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 2), done.stderr
    assert done.stderr.startswith(b"error: standard output cannot be written\n  got:      No space")


def test_a_reader_that_has_seen_enough() -> None:
    line = f"{' '.join(COMMAND)} --version | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(
    "redirections",
    ["<&- >&- 2>&-", *(pytest.param(r, marks=pytest.mark.slow) for r in ("2>/dev/full", "2>&1 | true"))],
)
def test_work_does_not_depend_on_who_listens(redirections: str, shop: Path, tmp_path: Path) -> None:
    """Lost messages stop nothing, and nothing is printed into the files that are written."""
    line = f"{' '.join(COMMAND)} convert {shop}/parent {tmp_path}/a --kv-heads 2 --method mean {redirections}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert run("convert", shop / "parent", tmp_path / "b", "--kv-heads", 2, "--method", "mean")[0] == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_result_that_goes_nowhere() -> None:
    line = f"{' '.join(COMMAND)} --version >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=False, timeout=60)
    assert (done.returncode, b"standard output cannot be written" in done.stderr) == (2, True)


def test_a_terminal_of_ascii(tmp_path: Path, shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process, with streams of ASCII: all that every verb prints, tables and marks, and its help."""
    made = copy(shop / "parent", tmp_path / "é→")
    runner = CliRunner(charset="ascii")
    for arguments, words in (
        (["inspect", made], ["\\xe9->", "4,096", "KV heads"]),
        (["convert", made, tmp_path / "c", "--kv-heads", 2, "--method", "mean"], ["-> ", "\\xe9->", "wrote"]),
        (["verify", made, tmp_path / "c"], ["+ all tensors are present"]),
        (["inspect", tmp_path / "ü"], ["error: ", "\\xfc"]),
        (["convert", "--help"], ["Usage: regroup convert"]),
        (["advise", "--bad→"], ["No such option"]),
    ):
        result = runner.invoke(app, [str(argument) for argument in arguments])
        assert isinstance(result.exception, SystemExit | None), result.exception
        assert [word for word in words if word not in result.output] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "env", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_a_process_on_a_terminal_of_ascii(env: dict[str, str], shop: Path, tmp_path: Path) -> None:
    made = copy(shop / "parent", tmp_path / "é→")
    for arguments in (
        ["convert", made, tmp_path / "c", "--kv-heads", 2, "--method", "mean"],
        ["verify", made, tmp_path / "c"],
        ["uptrain", "--help"],
    ):
        done = called(*arguments, env=env, stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
        assert b"UnicodeEncodeError" not in done.stderr


@pytest.mark.parametrize(
    "first", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP))]
)
def test_signals_that_come_twice(first: int, shop: Path, tmp_path: Path) -> None:
    """Clean-up is finished, whatever else comes; a script stops the command at a known place."""
    script = f"""
import os, signal, sys
from regroup import cli
from regroup.writer import journal
def stopped(*_, **__):
    os.kill(os.getpid(), {int(first)})
    try:
        signal.pause()
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
journal.write_text = stopped
folders = {str(shop / "parent")!r}, {str(tmp_path / "child")!r}
sys.argv = ["regroup", "convert", *folders, "--kv-heads", "2", "--method", "mean"]
cli.main()
"""
    done = scripted(script)
    assert done.returncode == 2, done.stderr
    assert done.stderr.rstrip().endswith(b"no incomplete result was left"), done.stderr
    assert b"Traceback" not in done.stderr
    assert everything(tmp_path) == []


@pytest.mark.parametrize("comes_again", [True, False], ids=["as it is", "control"])
@pytest.mark.parametrize("swallowed", ["except", "finalizer"])
def test_signals_that_a_library_swallows(swallowed: str, comes_again: bool) -> None:
    """An ``except:`` or code that cannot raise takes the exception: the command ends all the same."""
    script = f"""
import os, signal, sys, time, typer
from regroup import cli
from regroup.cli import streams
def stop():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
class Swallowing:
    def __del__(self):
        stop()
def verb() -> None:
    if not {comes_again}:
        streams.work_ended()
    if {swallowed == "finalizer"}:
        Swallowing()
    else:
        try:
            stop()
        except:
            pass
    for _ in range(100):
        time.sleep(0.01)
    print("worked on")
cli.app.registered_commands.clear()
cli.app.command(name="verb")(verb)
sys.argv = ["regroup", "verb"]
cli.main()
"""
    done = scripted(script)
    if comes_again:
        assert (done.returncode, done.stdout) == (2, b""), done.stderr
        assert done.stderr.rstrip().endswith(b"no incomplete result was left"), done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, b"worked on\n"), done.stderr


def test_a_signal_as_the_process_ends_leaves_its_status() -> None:
    """Python puts the system's handlers back before it is gone; a second Ctrl-C would become the exit status."""
    script = """
import os, signal, sys
from regroup import cli
class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), number=signal.SIGINT):
        kill(me, number)
late = Late()
def verb() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
cli.app.registered_commands.clear()
cli.app.command(name="verb")(verb)
sys.argv = ["regroup", "verb"]
cli.main()
"""
    done = scripted(script)
    assert done.returncode == 2, done.stderr
    control = script.replace("cli.main()", "cli.streams.atexit.register = lambda *_: None\ncli.main()")
    done = scripted(control)
    assert done.returncode == -signal.SIGINT, done.stderr


def test_numbers_that_nothing_counts_with(shop: Path, tmp_path: Path) -> None:
    """Every whole number of every verb is refused beyond 64 bits, by its option, before a library stumbles on it."""
    largest, seen = 2**63 - 1, 0
    needed = {"advise": ["--hardware", "l4", "--context", 16, "--batch", 2], "export": ["--to", "hf"]}
    for usage in re.findall(r"\$ regroup (.*)\n((?:.*\n)*?)(?=\n##|\Z)", REFERENCE.read_text(encoding="utf-8")):
        words = [word for word in usage[0].split() if word.islower()]
        places = [tmp_path / "x" for _ in re.findall(r"\{", usage[0])]
        for option in re.findall(r"^\* `(?:-., )?(--[a-z-]+).*<int(?: range)?>`: (?!.*x<=)", usage[1], re.MULTILINE):
            seen += 1
            message = refused(*words, *places, *needed.get(words[0], ()), f"{option}={largest + 1}")
            assert "a number is too large" in message
            assert f"{option} of at most" in message
    assert seen > 40
    # Control: the largest one is a number.
    scored = ("evaluate", shop / "parent", "--data", shop / "held-out.txt", "--window", 16)
    status, _, message = run(*scored, "--batch", largest)
    assert status == 0, message


SPECIAL = ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "extra.txt"]


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_what_is_no_file_in_a_checkpoint(
    kind: str, name: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening it could wait for ever; each verb says what it is instead."""
    folder = copy(shop / "parent", tmp_path / "p")
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        monkeypatch.chdir(folder)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)
    else:
        path.symlink_to("/dev/zero")
    verbs = {
        "inspect": [folder],
        "convert": [folder, tmp_path / "c", "--kv-heads", 2],
        "evaluate": [folder, "--data", shop / "held-out.txt", "--window", 16],
        "verify": [shop / "parent", folder, "--plan", shop / "child" / "regroup_plan.json"],
    }
    for verb, arguments in verbs.items():
        status, out, message = run(verb, *arguments)
        assert status == (1 if verb == "verify" else 2)
        assert str(path) in out + message
        assert kind in out + message
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("where", ["model_type", "hidden_act", "architectures", "tensor", "shard"])
def test_names_from_a_checkpoint_command_no_terminal(where: str, shop: Path, tmp_path: Path) -> None:
    name = "\x1b[2J\x07x\nerror: all is well\u202e"
    folder, weights = copy(shop / "parent", tmp_path / "p"), tensors(shop / "parent")
    if where == "tensor":
        write(folder, config_of(folder), {**weights, name: next(iter(weights.values())).clone()})
    elif where == "shard":
        (folder / "model.safetensors").unlink()
        write(folder, config_of(folder), weights, shards={f"{name}.safetensors": list(weights)})
    else:
        edit_json(folder / "config.json", **{where: [name] if where == "architectures" else name})
    shown = ""
    for arguments in (
        ["inspect", folder],
        ["convert", folder, tmp_path / "c", "--kv-heads", 2, "--method", "mean"],
        ["verify", folder, tmp_path / "c"],
        ["evaluate", folder, "--data", shop / "held-out.txt", "--window", 16, "--windows", 2],
    ):
        if where == "tensor" and arguments[0] == "evaluate":
            continue  # transformers lists it on a stream of its own: see the next test
        status, out, message = run(*arguments)
        assert status in (0, 1, 2)
        shown += out + message
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert "\nerror: all is well" not in shown


def test_what_libraries_log_commands_no_terminal() -> None:
    code = """
import logging, sys, warnings
from regroup import cli
def verb(): logging.getLogger("x").warning("a %s\\nb", "\\x1b[2J"); warnings.warn("\\x1b[2J"); sys.exit(0)
cli.app = lambda prog_name: verb()
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=60)
    assert (done.returncode, b"\x1b" in done.stderr) == (0, False)
    assert done.stderr.startswith(b"a \\x1b[2J\nb\n")
    assert done.stderr.count(b"\\x1b[2J") >= 2


def test_a_record_names_what_no_text_can(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy(shop / "parent", tmp_path / "caf\udce9")
    status, _, message = run("inspect", "caf\udce9", "--record", tmp_path / "record.json")
    assert status == 0, message
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["configuration"]["model"] == "caf\\udce9"
