"""The commands: what they print, what they leave behind, how they end."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seamount.cluster.cli import main
from seamount.cluster.settings import load_settings
from seamount.router.tenants import read_api_keys
from seamount.router.tokenizer import Tokenizer

COMMANDS = (
    "up",
    "demo",
    "status",
    "drain",
    "chat",
    "settings",
    "key",
    "checkpoint init",
    "checkpoint quantize",
    "k8s preflight",
    "k8s status",
    "k8s drain",
)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SEAMOUNT_")} | {
    "COLUMNS": "200",
    "NO_COLOR": "1",
}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("SEAMOUNT_"):
            monkeypatch.delenv(name)


def run(*arguments: str) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    code = caught.value.code
    return code if isinstance(code, int) else 0 if code is None else 1


def spawn(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "seamount.cluster.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, **options
    )


def finish(*arguments: str, stdin: str = "", timeout_s: float = 60.0) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "seamount.cluster.cli", *arguments],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        timeout=timeout_s,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert f"seamount {command}" in out


def test_help_as_a_process_is_quick_and_lists_every_command() -> None:
    started = time.monotonic()
    code, out = finish("--help")
    assert code == 0
    assert all(command.split()[0] in out for command in COMMANDS)
    assert time.monotonic() - started < 10  # nothing heavy is imported for it


def test_help_imports_neither_torch_nor_ray_nor_kubernetes() -> None:
    heavy = ("torch", "ray", "transformers", "kubernetes")
    code = f"import sys, seamount.cluster.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert re.fullmatch(r"seamount \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "No such command"),
        (["up", "--nope"], "No such option"),
        (["up", "--config", "none.yaml"], "cannot read none.yaml"),
        (["status", "--config", "none.yaml"], "cannot read none.yaml"),
        (["key", "a/b"], "a tenant has 1 to 64"),
        (["key", "acme", "--file", "/no/such/folder/keys"], "cannot write"),
        (["checkpoint", "init"], "Missing argument"),
        (["checkpoint", "init", "x", "--geometry", "huge"], "geometry 'huge' is unknown"),
        (["checkpoint", "init", "x", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["checkpoint", "quantize", "none", "new"], "cannot read"),
        (["chat", "--tools", "none.json"], "cannot read none.json"),
        (["chat", "--address", "127.0.0.1:1", "--tls-ca", "none.pem"], "cannot read none.pem"),
        (["chat", "--address", "127.0.0.1:1", "--tls-key", "k.pem"], "needs its key"),
    ],
)
def test_wrong_use_ends_with_2_and_no_traceback(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert list(Path.cwd().iterdir()) == []


def test_an_unknown_setting_is_named_with_the_closest_one(capsys: pytest.CaptureFixture[str]) -> None:
    Path("serving.yaml").write_text("engine: {max_runing: 3}")
    assert run("up", "--plain") == 2
    assert "unknown key engine.max_runing; the closest known one is engine.max_running" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "demo"])
def test_a_model_that_is_not_there_is_not_replaced(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--plain") == 1
    assert "there is no config.json in" in capsys.readouterr().err
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("command", ["status", "chat"])
def test_without_a_router_it_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert run(command, "--address", "127.0.0.1:1") == 1
    assert "no connection to 127.0.0.1:1 within 1 s" in capsys.readouterr().err
    assert time.monotonic() - started < 8


def test_the_address_comes_from_option_then_variable_then_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("serving.yaml").write_text("router: {port: 3}")
    run("status")
    assert "127.0.0.1:3" in capsys.readouterr().err
    monkeypatch.setenv("SEAMOUNT_ADDRESS", "127.0.0.1:2")
    run("status")
    assert "127.0.0.1:2" in capsys.readouterr().err
    run("status", "--address", "127.0.0.1:1")
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_settings_prints_a_file_to_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("settings") == 0
    printed = capsys.readouterr().out
    Path("serving.yaml").write_text(printed)
    assert load_settings(environ={}) == load_settings(Path("serving.yaml"), environ={})
    assert "# What clients reach" in printed


def test_key_prints_the_key_and_appends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("key", "acme", "--file", "keys") == 0
    acme = capsys.readouterr().out.strip()
    Path("keys").write_text(Path("keys").read_text().rstrip("\n"))  # as an editor may leave it
    assert run("key", "operations", "--admin", "--file", "keys") == 0
    operations = capsys.readouterr().out.strip()
    keys = read_api_keys(Path("keys"))
    found = [keys.find(acme), keys.find(operations)]
    assert [(who.tenant, who.admin) for who in found if who] == [("acme", False), ("operations", True)]
    assert acme not in Path("keys").read_text()
    assert stat.S_IMODE(Path("keys").stat().st_mode) == 0o600
    assert run("key", "acme") == 0
    captured = capsys.readouterr()
    Path("other").write_text(captured.err.splitlines()[-1])
    assert read_api_keys(Path("other")).find(captured.out.strip()) is not None


def test_checkpoints_are_whole_and_repeatable(capsys: pytest.CaptureFixture[str]) -> None:
    for path, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert run("checkpoint", "init", path, "--seed", seed, "--geometry", "test") == 0
    contents = {path: {f.name: f.read_bytes() for f in Path(path).iterdir()} for path in "abc"}
    assert set(contents["a"]) >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert contents["a"] == contents["b"]
    assert contents["a"]["model.safetensors"] != contents["c"]["model.safetensors"]
    config = json.loads(contents["a"]["config.json"])
    tokenizer = Tokenizer.load(Path("a/tokenizer.json"))
    assert config["vocab_size"] == tokenizer.vocab_size
    assert config["eos_token_id"] == tokenizer.eos_token_id
    capsys.readouterr()
    assert run("checkpoint", "init", "a", "--geometry", "test") == 1
    assert "exists" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in Path("a").iterdir()} == contents["a"]


def test_quantising_keeps_the_tokenizer_and_says_where_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("checkpoint", "init", "model") == 0
    assert run("checkpoint", "quantize", "model", "model-fp8") == 0
    assert "wrote model-fp8" in capsys.readouterr().out
    assert Path("model-fp8/tokenizer.json").read_bytes() == Path("model/tokenizer.json").read_bytes()
    assert json.loads(Path("model-fp8/config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert run("checkpoint", "quantize", "model", "model-fp8") == 1
    assert "exists" in capsys.readouterr().err


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """``seamount up`` in the current folder, with the address it prints; killed if the test left it running."""
    process = spawn("up", *arguments)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"serving on (\S+);", line):
                yield process, found[1]
                return
        pytest.fail(f"up ended with {process.wait(10)}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


SMALL = """
model: {path: model, name: small}
router: {port: 0, sampling: {max_output_tokens: 8}}
cache: {num_pages: 64}
engine: {max_context_tokens: 2048}
pools: {prefill: {gangs: 0}, decode: {expert_parallel: 1}}
"""


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_status_and_chat_until_a_signal(number: signal.Signals) -> None:
    Path("serving.yaml").write_text(SMALL)
    assert run("checkpoint", "init", "model", "--geometry", "test") == 0
    with serving("--plain") as (process, address):
        code, out = finish("status", "--json", "--address", address)
        status = json.loads(out)
        assert (code, status["complete"]) == (0, True)
        assert [pool["pool"] for pool in status["pools"] if pool["num_ranks"]] == ["decode"]
        assert status["ranks"][0]["state"]["num_pages"] == 64
        code, out = finish("status", "--address", address)
        assert code == 0
        assert "healthy" in out
        code, out = finish("chat", "--address", address, "--seed", "3", stdin=f"{'hello ' * 60}\nagain\n/quit\n")
        assert code == 0
        receipts = [[int(n) for n in found] for found in re.findall(r"\[prompt (\d+) tokens: (\d+) cached", out)]
        assert len(receipts) == 2
        assert receipts[0][1] == 0
        assert receipts[1][1] >= 64, "a page at least lies before what the second question cuts"
        assert "Traceback" not in out
        process.send_signal(number)
        assert process.wait(30) == 0


@pytest.mark.cluster
def test_up_says_which_process_died() -> None:
    Path("serving.yaml").write_text(SMALL)
    assert run("checkpoint", "init", "model", "--geometry", "test") == 0
    with serving("--plain") as (process, address):
        _, out = finish("status", "--json", "--address", address)
        os.kill(int(json.loads(out)["ranks"][0]["state"]["process_id"]), signal.SIGKILL)
        assert process.wait(30) == 1
        assert process.stdout is not None
        assert "decode-0.0 ended with code -9" in process.stdout.read()


@pytest.mark.cluster
@pytest.mark.parametrize("arguments", [["demo", "--plain"], ["demo"]], ids=["plain processes", "Ray Serve"])
def test_the_demo_passes(arguments: list[str]) -> None:
    Path("checkpoints").symlink_to(Path(__file__).parents[2] / "checkpoints")
    code, out = finish(*arguments, timeout_s=240)
    assert code == 0, out
    assert "the demo passed" in out
    assert "✗" not in out
    assert out.count("✓") == 11
