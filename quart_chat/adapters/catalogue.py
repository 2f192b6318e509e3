"""Providers that need nothing but a key or a URL: their OpenAI-compatible endpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """Used when the variable ``key`` is set, or for servers without keys the variable ``url``."""

    base_url: str
    key: str | None = None
    url: str | None = None
    default_model: str | None = None
    reports_usage: bool = True

    @property
    def hint(self) -> str:
        """Instruction that makes the provider available."""
        return f"Set {self.key or self.url} to use it."


CATALOGUE: dict[str, Entry] = {
    "openai": Entry(
        "https://api.openai.com/v1", "OPENAI_API_KEY", "OPENAI_BASE_URL", "gpt-4o-mini"
    ),
    "anthropic": Entry(
        "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", default_model="claude-sonnet-4-5"
    ),
    "gemini": Entry(
        "https://generativelanguage.googleapis.com/v1beta/openai",
        "GEMINI_API_KEY",
        default_model="gemini-2.5-flash",
    ),
    "mistral": Entry(
        "https://api.mistral.ai/v1",
        "MISTRAL_API_KEY",
        default_model="mistral-small-latest",
        reports_usage=False,
    ),
    "groq": Entry(
        "https://api.groq.com/openai/v1", "GROQ_API_KEY", default_model="llama-3.3-70b-versatile"
    ),
    "deepseek": Entry(
        "https://api.deepseek.com/v1", "DEEPSEEK_API_KEY", default_model="deepseek-chat"
    ),
    "together": Entry(
        "https://api.together.xyz/v1",
        "TOGETHER_API_KEY",
        default_model="meta-llama/Llama-3.3-70B-Instruct-Turbo",
    ),
    "openrouter": Entry(
        "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", default_model="openrouter/auto"
    ),
    "xai": Entry("https://api.x.ai/v1", "XAI_API_KEY", default_model="grok-3-mini"),
    "ollama": Entry("http://127.0.0.1:11434/v1", url="OLLAMA_BASE_URL", default_model="llama3.2"),
    "lmstudio": Entry("http://127.0.0.1:1234/v1", url="LMSTUDIO_BASE_URL"),
    "vllm": Entry("http://127.0.0.1:8000/v1", url="VLLM_BASE_URL"),
    "llamacpp": Entry("http://127.0.0.1:8080/v1", url="LLAMACPP_BASE_URL"),
}
