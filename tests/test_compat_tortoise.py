"""What is used of Tortoise besides its public API, against the installed version."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tortoise.context import get_current_context

from quart_chat.adapters.database.urls import APP, CONNECTION, tortoise_config
from quart_chat.compat.tortoise import KeptContext, check, migrate, pending_migrations
from quart_chat.errors import ConfigurationError


def test_the_installed_version_fits() -> None:
    check()


@pytest.mark.parametrize("installed", ["1.0.9", "1.1.8", "1.2.0", "2.0", "0.25.4"])
def test_another_version_is_refused_in_words(installed: str) -> None:
    with pytest.raises(ConfigurationError, match=f"tortoise-orm {installed} is not supported"):
        check(installed)


@pytest.mark.parametrize("installed", ["1.1.9", "1.1.10", "1.1.99"])
def test_later_fixes_are_taken(installed: str) -> None:
    check(installed)


async def test_a_kept_context_is_current_in_its_own_tasks_alone(tmp_path: Path) -> None:
    config = tortoise_config(f"sqlite://{tmp_path / 'chat.sqlite3'}")
    kept = KeptContext()
    kept.enter()

    async def within() -> object:
        return get_current_context()

    async def migrated() -> tuple[list[str], list[str]]:
        await kept.tortoise.init(config=config)
        before = await pending_migrations(kept.client(CONNECTION), config["apps"], APP)
        await migrate(kept.client(CONNECTION), config["apps"], APP)
        after = await pending_migrations(kept.client(CONNECTION), config["apps"], APP)
        await kept.tortoise.close_connections()
        return before, after

    assert get_current_context() is not kept.tortoise
    both = await asyncio.gather(
        *(asyncio.create_task(within(), context=kept.inside.copy()) for _ in range(2))
    )
    assert both == [kept.tortoise] * 2
    before, after = await asyncio.create_task(migrated(), context=kept.inside)
    assert before[0] == "0001_initial"
    assert after == []
    kept.leave()
