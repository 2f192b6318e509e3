"""Which models there are, and which of them a message gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import InvalidMessage, ProviderNotConfigured, UnknownModel, UnknownProvider
from .ports import ModelInfo, Provider


@dataclass(frozen=True)
class ConfiguredProvider:
    """A configured provider. With ``models`` clients may choose only those."""

    name: str
    provider: Provider
    default_model: str | None = None
    models: tuple[str, ...] = ()

    @property
    def first_model(self) -> str | None:
        """What a message gets that names no model."""
        return self.default_model or (self.models[0] if self.models else None)


class ModelRegistry:
    """The configured providers, their models, and the defaults."""

    def __init__(
        self,
        sources: Iterable[ConfiguredProvider],
        *,
        default_provider: str | None = None,
        default_model: str | None = None,
        known: Mapping[str, str] | None = None,
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self._default_model = default_model
        self._known = dict(known or {})
        self.default_provider = default_provider or next(iter(self._sources), None)

    def __bool__(self) -> bool:
        return bool(self._sources)

    @property
    def default_model(self) -> str | None:
        """What a message gets that names neither provider nor model."""
        source = self._sources.get(self.default_provider or "")
        return self._default_model or (source.first_model if source else None)

    def names(self) -> list[str]:
        """The configured providers."""
        return list(self._sources)

    def choose(self, provider: str | None, model: str | None) -> tuple[ConfiguredProvider, str]:
        """The provider and model for a message.

        Raises:
            UnknownProvider, ProviderNotConfigured, UnknownModel: The client may not choose that.
            InvalidMessage: No model is named and there is no default.
        """
        source = self._source(provider or self.default_provider)
        default = source.first_model
        if source.name == self.default_provider:
            default = self._default_model or default
        chosen = model or default
        if chosen is None:
            raise InvalidMessage(f"model: name a model of {source.name}; there is no default.")
        allowed = {*source.models, *([source.default_model] if source.default_model else [])}
        if source.models and chosen not in allowed and chosen != default:
            choices = ", ".join(source.models)
            raise UnknownModel(f"model: {source.name} offers {choices} here, not {chosen!r}.")
        return source, chosen

    def _source(self, name: str | None) -> ConfiguredProvider:
        if name is None:
            raise ProviderNotConfigured(
                "No provider is configured. Set OPENAI_API_KEY or another provider's key, "
                f"CHAT_PROVIDERS, or use the local model. {self._known.get('local', '')}"
            )
        if (source := self._sources.get(name)) is not None:
            return source
        if name in self._known:
            raise ProviderNotConfigured(f"provider: {name} is not set up. {self._known[name]}")
        choices = ", ".join(self._sources) or "none"
        raise UnknownProvider(f"provider: there is no {name!r}; configured are: {choices}.")

    def list(self) -> list[ModelInfo]:
        """Every model that is known by name, defaults included."""
        models = []
        for source in self._sources.values():
            is_default = source.name == self.default_provider
            default = (self._default_model if is_default else None) or source.first_model
            models += [
                ModelInfo(name, source.name, is_default and name == default)
                for name in dict.fromkeys([*([default] if default else []), *source.models])
            ]
        return models
