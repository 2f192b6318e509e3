"""Settings: defaults, the environment, well-known variables, and errors that name the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from quart import Quart

from quart_chat import ConfigurationError, QuartChat, create_app
from quart_chat.config import DEFAULTS, Settings, install_command, merge_keywords, resolve

REFERENCE = Path(__file__).parent.parent / "docs" / "reference" / "configuration.md"


def test_every_default_is_valid() -> None:
    assert resolve(DEFAULTS, {}) == resolve({}, {})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("CHAT_ON_BUSY", "wait", "CHAT_ON_BUSY: 'wait' is not allowed: .*'interrupt'.*'queue'"),
        ("CHAT_QUEUE_LIMIT", "many", "CHAT_QUEUE_LIMIT: 'many' is not allowed: .*integer"),
        ("CHAT_RUN_TIMEOUT", -1, "CHAT_RUN_TIMEOUT: -1 is not allowed: .*greater"),
        ("CHAT_RATE_LIMIT", "5 a day", "'5 a day' is not allowed: .* for instance 60/minute"),
        ("CHAT_PROVIDERS", "{", r"CHAT_PROVIDERS: is not valid JSON \(line 1, column 2"),
        ("CHAT_SUPABASE_ALGORITHMS", "none", "CHAT_SUPABASE_ALGORITHMS"),
        ("CHAT_PROVIDERS", {"x": {"url": "u"}}, r"CHAT_PROVIDERS \(x.url\)"),
        ("CHAT_PROVIDERS", {"x": {"base_url": "ftp://x"}}, r"CHAT_PROVIDERS \(x.base_url\)"),
        ("CHAT_MCP_SERVERS", {"x": {}}, r"CHAT_MCP_SERVERS \(x\): needs either command or url"),
        ("CHAT_KEEPALIVE", 0, "CHAT_KEEPALIVE: 0 is not allowed"),
        ("CHAT_AUTH", "remote", "CHAT_SUPABASE_URL: remote auth needs it; set SUPABASE_URL"),
        ("CHAT_ON_BUSYY", "x", "CHAT_ON_BUSYY: there is no such key. Did you mean CHAT_ON_BUSY?"),
        ("CHAT_HISTORY_MESSAGE", 1, "Did you mean CHAT_HISTORY_MESSAGES?"),
    ],
)
def test_a_wrong_setting_is_a_sentence(key: str, value: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        resolve({key: value}, {})


def test_an_unknown_key_says_where_it_came_from() -> None:
    with pytest.raises(ConfigurationError, match="QUART_CHAT_CMD sets it"):
        resolve({"CHAT_CMD": "x"}, {"QUART_CHAT_CMD": "x"})


def test_keywords_need_no_prefix_and_keys_do() -> None:
    merged = merge_keywords({"CHAT_ON_BUSY": "queue", "OTHER": 1}, {"protocol": "sse"})
    assert merged == {"CHAT_ON_BUSY": "queue", "OTHER": 1, "CHAT_PROTOCOL": "sse"}
    with pytest.raises(ConfigurationError, match=r"^PROTOCOL: .* Write CHAT_PROTOCOL\.$"):
        merge_keywords({"PROTOCOL": "both"})
    with pytest.raises(ConfigurationError, match=r"^protocl: .* Did you mean protocol\?$"):
        merge_keywords({}, {"protocl": "both"})


def test_an_extra_is_installed_from_where_the_package_came() -> None:
    command = install_command("local")
    found = re.fullmatch(r"pip install '(.+)\[local\]'", command)
    assert found
    assert found[1] == "quart-chat" or (Path(found[1]) / "pyproject.toml").exists()


def test_a_secret_is_not_repeated() -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolve({"CHAT_PROVIDERS": {"x": {"api_key": "sk-secret", "nonsense": "sk-secret"}}}, {})
    assert "sk-secret" not in str(caught.value)


def test_values_of_the_environment_are_understood() -> None:
    settings = resolve(
        {
            "CHAT_ALLOWED_ORIGINS": "https://a.example, https://b.example",
            "CHAT_TOOLS": '["one", "two"]',
            "CHAT_PROVIDERS": '{"x": {"base_url": "http://127.0.0.1:1/v1"}}',
            "CHAT_RUN_TIMEOUT": "30",
            "CHAT_MIGRATE": "false",
            "CHAT_DEFAULT_MODEL": 4,
            "CHAT_SYSTEM_PROMPT": "",
        },
        {},
    )
    assert settings.allowed_origins == ("https://a.example", "https://b.example")
    assert settings.tools == ("one", "two")
    assert settings.providers["x"].base_url == "http://127.0.0.1:1/v1"
    assert settings.run_timeout == 30
    assert settings.migrate is False
    assert settings.default_model == "4"
    assert settings.system_prompt is None


def test_well_known_variables_stand_in() -> None:
    environ = {
        "DATABASE_URL": "postgres://u:p@h/d",
        "SUPABASE_URL": "https://x.supabase.co",
        "SUPABASE_KEY": "key",
        "NODETOOL_ENVIRONMENT": "production",
    }
    settings = resolve({}, environ)
    assert settings.database_url == "postgres://u:p@h/d"
    assert settings.supabase_url == "https://x.supabase.co"
    assert settings.environment == "production"
    assert resolve({"CHAT_DATABASE_URL": "sqlite://x"}, environ).database_url == "sqlite://x"


def test_remote_auth_has_defaults_for_the_public() -> None:
    remote = resolve(
        {"CHAT_AUTH": "remote", "CHAT_SUPABASE_URL": "https://x", "CHAT_SUPABASE_KEY": "k"}, {}
    )
    assert (remote.rate_limit, remote.max_runs_per_user) == ("60/minute", 8)
    assert remote.max_connections_per_user == 32
    assert resolve({}, {}).rate_limit is None


def test_the_environment_reaches_create_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUART_CHAT_ON_BUSY", "queue")
    monkeypatch.setenv("QUART_CHAT_QUEUE_LIMIT", "3")
    settings = create_app({"CHAT_QUEUE_LIMIT": 4}).extensions["quart_chat"].settings
    assert (settings.on_busy, settings.queue_limit) == ("queue", 4)


def test_two_applications_have_two_configurations() -> None:
    chat = QuartChat()
    one, two = Quart("one"), Quart("two")
    one.config["CHAT_ON_BUSY"], two.config["CHAT_ON_BUSY"] = "reject", "queue"
    chat.init_app(one)
    chat.init_app(two)
    assert one.extensions["quart_chat"].settings.on_busy == "reject"
    assert two.extensions["quart_chat"].settings.on_busy == "queue"


def test_a_host_may_have_keys_of_its_own() -> None:
    app = Quart("host")
    app.config["CHATTY"] = True
    QuartChat(app)
    app.config["CHAT_TYPO"] = True
    with pytest.raises(ConfigurationError, match="CHAT_TYPO"):
        QuartChat(app)


def test_the_reference_lists_every_key() -> None:
    rows = re.findall(r"^\| `(CHAT_\w+)` \| (.*?) \| (.*) \|$", REFERENCE.read_text(), re.MULTILINE)
    assert [key for key, _, _ in rows] == list(DEFAULTS)
    for (key, _, text), field in zip(rows, Settings.model_fields.values(), strict=True):
        assert text.replace("\\|", "|") == field.description, key
