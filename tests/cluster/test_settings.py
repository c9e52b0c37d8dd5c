"""serving.yaml and the environment: what is accepted, what is refused, and what the refusal says."""

import pickle
import re
from pathlib import Path

import pytest

from seamount.cluster.environment import client_environment
from seamount.cluster.settings import Settings, is_loopback, load_settings, validate
from seamount.wire import limits
from seamount.wire.errors import InvalidArgument

NO_ENVIRONMENT: dict[str, str] = {}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_defaults_are_the_demo_on_loopback() -> None:
    settings = load_settings(environ=NO_ENVIRONMENT)
    assert (settings.pools.prefill.gangs, settings.pools.prefill.expert_parallel) == (1, 1)
    assert (settings.pools.decode.gangs, settings.pools.decode.expert_parallel) == (1, 2)
    assert is_loopback(settings.router.host)
    assert is_loopback(settings.pools.host)
    assert settings.redis_url is None
    assert settings.model.path == Path.cwd() / "checkpoints/tiny-agent"


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path / "a.yaml", "# nothing\n"), environ=NO_ENVIRONMENT) == load_settings(environ={})


def test_one_key_of_a_section_leaves_the_others(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "pools: {decode: {gangs: 3}}\nrouter: {port: 0}\n")
    settings = load_settings(file, environ=NO_ENVIRONMENT)
    assert settings.pools.decode.gangs == 3
    assert settings.pools.decode.expert_parallel == 2
    assert settings.router.port == 0
    assert settings.router.turn_deadline_s == 600


def test_the_file_is_found_by_argument_then_variable_then_folder(tmp_path: Path) -> None:
    for name in ("given", "variable"):
        write(tmp_path / f"{name}.yaml", f"cluster_name: {name}")
    write(tmp_path / "serving.yaml", "cluster_name: folder")
    environ = {"SEAMOUNT_CONFIG": str(tmp_path / "variable.yaml")}
    assert load_settings(tmp_path / "given.yaml", environ=environ).cluster_name == "given"
    assert load_settings(environ=environ).cluster_name == "variable"
    assert load_settings(environ=NO_ENVIRONMENT).cluster_name == "folder"


def test_relative_paths_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    write(tmp_path / "etc" / "keys", "x")
    file = write(tmp_path / "etc" / "serving.yaml", "model: {path: m}\nrouter: {api_key_file: keys}\n")
    settings = load_settings(file, environ=NO_ENVIRONMENT)
    assert settings.redis.data_dir == tmp_path / "etc" / ".run" / "redis"
    assert settings.model.path == tmp_path / "etc" / "m"
    assert settings.router.api_key_file == tmp_path / "etc" / "keys"
    assert load_settings(write(file, "model: {path: /abs}"), environ=NO_ENVIRONMENT).model.path == Path("/abs")


def test_redis_comes_from_the_environment_alone_and_is_never_printed(tmp_path: Path) -> None:
    environ = {"SEAMOUNT_REDIS_URL": "redis://:hunter2@host:6379/0"}
    settings = load_settings(environ=environ)
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == environ["SEAMOUNT_REDIS_URL"]
    assert "hunter2" not in settings.to_yaml() + repr(settings) + str(settings)
    with pytest.raises(InvalidArgument, match="SEAMOUNT_REDIS_URL"):
        load_settings(write(tmp_path / "a.yaml", "redis_url: redis://x"), environ=NO_ENVIRONMENT)


def test_what_is_printed_reads_back_the_same(tmp_path: Path) -> None:
    settings = validate({"engine": {"max_running": 7}, "pools": {"prefill": {"resources": {"CPU": 0.5, "rack": 1}}}})
    text = settings.to_yaml()
    assert load_settings(write(tmp_path / "a.yaml", text), environ=NO_ENVIRONMENT) == settings
    assert load_settings(write(tmp_path / "a.yaml", settings.to_yaml(explained=True)), environ={}) == settings


def test_every_key_is_explained() -> None:
    lines = Settings().to_yaml(explained=True).splitlines()
    bare = [line for line in lines if not line.rstrip().endswith(":") and "#" not in line]
    assert bare == []


def test_settings_are_frozen_and_travel_to_other_processes() -> None:
    settings = validate({"cluster_name": "x"})
    with pytest.raises(ValueError, match="frozen"):
        settings.cluster_name = "y"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 - Ray hands settings to replicas this way


@pytest.mark.parametrize(
    ("chosen", "field", "closest"),
    [
        ({"rooter": {}}, "rooter", "router"),
        ({"router": {"prot": 1}}, "router.prot", "router.port"),
        ({"router": {"sampling": {"topp": 1}}}, "router.sampling.topp", "router.sampling.top_p"),
        ({"pools": {"prefill": {"gang": 1}}}, "pools.prefill.gang", "pools.prefill.gangs"),
        ({"zzz": 1}, "zzz", ""),
    ],
)
def test_unknown_keys_are_named_with_the_closest_one(chosen: dict, field: str, closest: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate(chosen)
    assert (caught.value.field, caught.value.reason) == (field, "UNKNOWN_SETTING")
    assert f"unknown key {field};" in caught.value.message
    assert caught.value.message.endswith(closest)


@pytest.mark.parametrize(
    ("chosen", "field"),
    [
        ({"pools": {"decode": {"gangs": 0}}}, "pools.decode.gangs"),
        ({"pools": {"prefill": {"gangs": -1}}}, "pools.prefill.gangs"),
        ({"pools": {"prefill": {"resources": {"GPU": -1}}}}, "pools.prefill.resources.GPU"),
        ({"cache": {"layout": "int4"}}, "cache.layout"),
        ({"cache": {"dtype": "float16"}}, "cache.dtype"),
        ({"cache": {"num_pages": "many"}}, "cache.num_pages"),
        ({"engine": {"step_timeout_s": float("nan")}}, "engine.step_timeout_s"),
        ({"engine": {"step_timeout_s": 0}}, "engine.step_timeout_s"),
        ({"engine": {"max_context_tokens": limits.MAX_CONTEXT_TOKENS + 1}}, "engine.max_context_tokens"),
        ({"router": {"port": 65536}}, "router.port"),
        ({"router": {"sampling": {"temperature": 2.01}}}, "router.sampling.temperature"),
        ({"router": {"sampling": {"top_p": 0}}}, "router.sampling.top_p"),
        ({"router": 3}, "router"),
        ({"cluster_name": "Not-Lower"}, "cluster_name"),
        ({"cluster_name": "a/b"}, "cluster_name"),
        ({"engine": {"max_context_tokens": 129}, "cache": {"num_pages": 2}}, "engine.max_context_tokens"),
        ({"directory": {"beat_s": 1, "dead_after_s": 2.9}}, "directory.dead_after_s"),
        ({"router": {"tls_key_file": "k"}}, "router.tls_certificate_file"),
        ({"router": {"client_ca_file": "k"}}, "router.client_ca_file"),
        ({"router": {"api_key_file": "no-such-file"}}, "router.api_key_file"),
        ({"autoscaling": {"decode": {"min_gangs": 3, "max_gangs": 2}}}, "autoscaling.decode.max_gangs"),
        ({"autoscaling": {"decode": {"min_gangs": 0}}}, "autoscaling.decode.min_gangs"),
        ({"autoscaling": {"routers": {"min_replicas": 2}}}, "autoscaling.routers.max_replicas"),
        ({"autoscaling": {"max_occupancy": 1.1}}, "autoscaling.max_occupancy"),
        ({"autoscaling": {"enabled": True}, "placement": {"path": "remote"}}, "autoscaling.prefill.min_gangs"),
        ({"autoscaling": {"enabled": True}, "placement": {"path": "local"}}, "autoscaling.prefill.max_gangs"),
        ({"draining": {"turns_s": 60, "timeout_s": 59}}, "draining.timeout_s"),
    ],
)
def test_wrong_values_are_refused_by_name(chosen: dict, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate(chosen)
    assert caught.value.field == field
    assert field in caught.value.message


def test_the_bounds_themselves_are_allowed() -> None:
    validate(
        {
            "pools": {"prefill": {"gangs": 0}},
            "engine": {"max_context_tokens": 128},
            "cache": {"num_pages": 2},
            "directory": {"beat_s": 1, "dead_after_s": 3},
            "router": {"port": 65535, "sampling": {"temperature": 2, "top_p": 1}},
        }
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "router.example", ""])
def test_beyond_loopback_the_router_needs_keys(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        validate({"router": {"host": host}})
    assert caught.value.field == "router.host"
    if host:
        assert "router.api_key_file" in caught.value.message
        file = write(tmp_path / "keys", "x")
        assert validate({"router": {"host": host, "api_key_file": str(file)}}).router.host == host


@pytest.mark.parametrize("host", ["node", "0.0.0.0", "fe80::1"])
def test_beyond_loopback_ranks_need_a_token(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape("router.worker_token_file")) as caught:
        validate({"pools": {"host": host}})
    assert caught.value.field == "pools.host"
    file = write(tmp_path / "token", "x")
    assert validate({"pools": {"host": host}, "router": {"worker_token_file": str(file)}}).pools.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_nothing(host: str) -> None:
    assert validate({"router": {"host": host}, "pools": {"host": host}}).router.host == host


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "must hold keys and values"),
        ("router: {port: 1}\nrouter: {port: 2}\n", "router stands there twice"),
        ("router: {port: 1, port: 2}\n", "port stands there twice"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_files_that_are_no_settings_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(says)):
        load_settings(write(tmp_path / "a.yaml", text), environ=NO_ENVIRONMENT)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot read"):
        load_settings(tmp_path / "none.yaml", environ=NO_ENVIRONMENT)
    with pytest.raises(InvalidArgument, match="cannot read"):
        load_settings(environ={"SEAMOUNT_CONFIG": str(tmp_path / "none.yaml")})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidArgument, match="cannot read"):
        load_settings(tmp_path / "binary", environ=NO_ENVIRONMENT)


def test_the_client_reads_its_two_variables() -> None:
    assert client_environment({}).address is None
    assert client_environment({"SEAMOUNT_API_KEY": "", "SEAMOUNT_ADDRESS": ""}).api_key is None
    known = client_environment({"SEAMOUNT_API_KEY": "secret-key", "SEAMOUNT_ADDRESS": "h:1"})
    assert known.address == "h:1"
    assert known.api_key is not None
    assert known.api_key.get_secret_value() == "secret-key"
    assert "secret-key" not in repr(known)
