"""One contract of the ``Storage`` and ``UserData`` ports, over memory, SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from conftest import unique
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quart_chat.adapters import Stores, stores
from quart_chat.config import resolve
from quart_chat.core.messages import Message, Thread, ToolCall, now
from quart_chat.core.ports import MAX_BRANCHES, RunRecord, Window
from quart_chat.core.search import SEARCHED_CHARS, contains, pieces
from quart_chat.errors import IdConflict, InvalidMessage, NotFound

ALL = Window(limit=10_000, branch="all")
PATH = Window(limit=10_000)


@pytest.fixture(scope="module", params=["memory", "sqlite", "postgres"])
async def kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stores]:
    """The stores of one kind; tests keep apart by users of their own."""
    config: dict[str, Any] = {"CHAT_STORAGE": "memory"}
    if request.param == "sqlite":
        file = tmp_path_factory.mktemp("sqlite") / "chat.sqlite3"
        config = {"CHAT_DATABASE_URL": f"sqlite://{file}"}
    elif request.param == "postgres":
        config = {"CHAT_DATABASE_URL": request.getfixturevalue("postgres")()}
    async with AsyncExitStack() as stack:
        yield await stores(resolve(config, {}), stack)


@pytest.fixture
def user() -> str:
    return unique("user")


def said(message_id: str, thread: str = "t", parent: str | None = None, **more: Any) -> Message:
    more.setdefault("role", "user")
    more.setdefault("content", f"text of {message_id}")
    return Message(id=message_id, thread_id=thread, parent_id=parent, **more)


async def add(
    kept: Stores, user: str, *ids: str, parent: str | None = None, thread: str = "t"
) -> list[Message]:
    """Store a chain of messages below ``parent``, or below the newest."""
    chain = [said(ids[0], thread, parent)]
    chain += [said(after, thread, before) for before, after in itertools.pairwise(ids)]
    return list(await kept.storage.add_messages(user, chain, create=True))


async def ids(kept: Stores, user: str, window: Window, thread: str = "t") -> list[str]:
    return [each.id for each in await kept.storage.messages(user, thread, window)]


async def listed(kept: Stores, user: str, query: str | None = None, limit: int = 1000) -> list[str]:
    found = await kept.storage.threads(user, query=query, after=None, limit=limit)
    return [thread.id for thread in found]


async def exported(kept: Stores, user: str) -> list[dict[str, Any]]:
    return [record async for record in kept.user_data.export(user)]


async def test_a_thread_is_created_once(kept: Stores, user: str) -> None:
    thread = Thread(id="a/b %2F ü😀", title="Title", metadata={"a": [1, None, {"b": "ü"}]})
    assert await kept.storage.create_thread(user, thread) == thread
    assert await kept.storage.thread(user, thread.id) == thread
    with pytest.raises(IdConflict):
        await kept.storage.create_thread(user, Thread(id=thread.id))
    assert (await kept.storage.thread(user, thread.id)).title == "Title"


async def test_one_of_many_creators_at_once_succeeds(kept: Stores, user: str) -> None:
    made = await asyncio.gather(
        *(kept.storage.create_thread(user, Thread(id="t", title=str(n))) for n in range(8)),
        return_exceptions=True,
    )
    created = [thread for thread in made if isinstance(thread, Thread)]
    assert len(created) == 1
    assert sum(isinstance(each, IdConflict) for each in made) == 7
    assert (await kept.storage.thread(user, "t")).title == created[0].title


async def test_every_field_of_a_message_survives(kept: Stores, user: str) -> None:
    question = said(
        "q",
        content=[
            {"type": "text", "text": "look\nü😀"},
            {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}},
        ],
        metadata={"a": [1, None, {"b": 1.5}]},
        options={"temperature": 0.5, "fingerprint": "f"},
        run_id="r1",
        model="m",
        provider="p",
    )
    reply = Message(
        id="a",
        thread_id="t",
        role="assistant",
        content="",
        parent_id="q",
        run_id="r1",
        reasoning="because",
        tool_calls=(ToolCall("c1", "add", {"a": 1, "b": None}), ToolCall("c2", "add", {})),
        model="m",
        provider="p",
        status="stopped",
        usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "estimated": True},
    )
    result = Message(
        id="r",
        thread_id="t",
        role="tool",
        content="3",
        parent_id="a",
        tool_call_id="c1",
        name="add",
    )
    stored = await kept.storage.add_messages(user, [question, reply, result], create=True)
    assert [message.position for message in stored] == [1, 2, 3]
    found = await kept.storage.messages(user, "t", PATH)
    assert [message.to_dict() for message in found] == [message.to_dict() for message in stored]
    assert list(found) == list(stored)
    assert found[0].options == question.options
    assert found[1].tool_calls == reply.tool_calls
    assert found[0].created_at == question.created_at


async def test_positions_have_neither_gaps_nor_twins_under_concurrency(
    kept: Stores, user: str
) -> None:
    await asyncio.gather(*(add(kept, user, f"{n}a", f"{n}b") for n in range(20)))
    stored = await kept.storage.messages(user, "t", ALL)
    assert [message.position for message in stored] == list(range(1, 41))
    assert (await kept.storage.thread(user, "t")).message_count == 40
    places = {message.id: message.position for message in stored}
    for n in range(20):
        assert places[f"{n}b"] == places[f"{n}a"] + 1
    path = await ids(kept, user, PATH)
    assert path == [message.id for message in stored]


async def test_a_message_is_added_once(kept: Stores, user: str) -> None:
    first = (await add(kept, user, "m"))[0]
    again = await kept.storage.add_messages(user, [said("m", content="other")], create=True)
    assert list(again) == [first]
    both = await kept.storage.add_messages(user, [said("m"), said("n", parent="m")])
    assert both[0] == first
    assert (both[1].position, both[1].parent_id) == (2, "m")
    assert await ids(kept, user, ALL) == ["m", "n"]
    assert (await kept.storage.thread(user, "t")).message_count == 2


async def test_the_same_message_from_many_at_once_is_added_once(kept: Stores, user: str) -> None:
    await add(kept, user, "root")
    results = await asyncio.gather(*(add(kept, user, "m") for _ in range(10)))
    assert {result[0].position for result in results} == {2}
    assert len({result[0].created_at for result in results}) == 1
    assert {result[0].parent_id for result in results} == {"root"}
    assert await ids(kept, user, ALL) == ["root", "m"]


async def test_several_messages_are_one_unit(kept: Stores, user: str) -> None:
    await add(kept, user, "root")
    with pytest.raises(NotFound):
        await kept.storage.add_messages(user, [said("a"), said("b", parent="nowhere")])
    assert await ids(kept, user, ALL) == ["root"]
    assert (await kept.storage.thread(user, "t")).message_count == 1
    with pytest.raises(NotFound):
        await kept.storage.add_messages(
            user, [said("a", "new"), said("b", "new", "nowhere")], create=True
        )
    with pytest.raises(NotFound):
        await kept.storage.thread(user, "new")
    assert await listed(kept, user) == ["t"]


async def test_a_thread_or_parent_that_is_not_there_is_refused(kept: Stores, user: str) -> None:
    with pytest.raises(NotFound):
        await kept.storage.add_messages(user, [said("m")])
    with pytest.raises(NotFound):
        await kept.storage.add_messages(user, [said("m", parent="nowhere")], create=True)
    with pytest.raises(NotFound):
        await kept.storage.thread(user, "t")
    await add(kept, user, "root")
    await add(kept, user, "other", thread="t2")
    with pytest.raises(NotFound):
        await kept.storage.add_messages(user, [said("m", parent="other")])
    assert (await kept.storage.thread(user, "t")).message_count == 1


async def test_a_user_message_continues_from_the_newest_and_others_do_not(
    kept: Stores, user: str
) -> None:
    await add(kept, user, "a", "b")
    assert (await add(kept, user, "c"))[0].parent_id == "b"
    lone = said("system", role="system")
    assert (await kept.storage.add_messages(user, [lone]))[0].parent_id is None
    assert await ids(kept, user, PATH) == ["system"]
    assert (await add(kept, user, "d"))[0].parent_id == "system"


async def test_branches(kept: Stores, user: str) -> None:
    """An edit, an answer again, an edit of the edit, and a second child of the root."""
    await add(kept, user, "u1", "a1", "u2", "a2")
    await add(kept, user, "u2e", "a2e", parent="a1")
    assert await ids(kept, user, PATH) == ["u1", "a1", "u2e", "a2e"]
    await add(kept, user, "a2r", parent="u2e")
    assert await ids(kept, user, PATH) == ["u1", "a1", "u2e", "a2r"]
    await add(kept, user, "u3", "a3")
    assert await ids(kept, user, PATH) == ["u1", "a1", "u2e", "a2r", "u3", "a3"]
    await add(kept, user, "u3e", "a3e", parent="a2r")
    await add(kept, user, "u3f", parent="a2r")
    assert await ids(kept, user, PATH) == ["u1", "a1", "u2e", "a2r", "u3f"]
    await add(kept, user, "a1r", parent="u1")
    assert await ids(kept, user, PATH) == ["u1", "a1r"]
    await add(kept, user, "a2x", parent="a2")
    assert await ids(kept, user, PATH) == ["u1", "a1", "u2", "a2", "a2x"]
    stored = [
        "u1",
        "a1",
        "u2",
        "a2",
        "u2e",
        "a2e",
        "a2r",
        "u3",
        "a3",
        "u3e",
        "a3e",
        "u3f",
        "a1r",
        "a2x",
    ]
    assert await ids(kept, user, ALL) == stored
    ways = {
        "u1": "u1",
        "a2": "u1 a1 u2 a2",
        "a2e": "u1 a1 u2e a2e",
        "a3": "u1 a1 u2e a2r u3 a3",
        "a3e": "u1 a1 u2e a2r u3e a3e",
        "a1r": "u1 a1r",
    }
    for leaf, path in ways.items():
        assert await ids(kept, user, Window(limit=99, leaf=leaf)) == path.split()
        back = await ids(kept, user, Window(limit=99, leaf=leaf, order="desc"))
        assert back == path.split()[::-1]
    for branch in ("current", "all"):
        with pytest.raises(NotFound):
            await ids(kept, user, Window(limit=5, leaf="nowhere", branch=branch))  # type: ignore[arg-type]


@st.composite
def trees(draw: st.DrawFn) -> list[int | None]:
    """For every message the number of its parent; None is the newest message."""
    size = draw(st.integers(1, 9))
    return [
        None if n == 0 else draw(st.one_of(st.none(), st.integers(0, n - 1))) for n in range(size)
    ]


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(parents=trees(), limit=st.integers(1, 5))
async def test_every_path_of_any_tree_is_found_in_pages(
    kept: Stores, parents: list[int | None], limit: int
) -> None:
    user, above = unique("user"), dict[str, str]()
    for n, parent in enumerate(parents):
        stored = await add(kept, user, f"m{n}", parent=None if parent is None else f"m{parent}")
        if n:
            above[f"m{n}"] = f"m{n - 1 if parent is None else parent}"
            assert stored[0].parent_id == above[f"m{n}"]
    for n in range(len(parents)):
        path = [f"m{n}"]
        while path[0] in above:
            path.insert(0, above[path[0]])
        found = await paged(kept, user, Window(limit=limit, leaf=f"m{n}"))
        assert found == path
        found = await paged(kept, user, Window(limit=limit, leaf=f"m{n}", order="desc"))
        assert found == path[::-1]
    everything = [f"m{n}" for n in range(len(parents))]
    assert await paged(kept, user, Window(limit=limit, branch="all")) == everything
    backwards = Window(limit=limit, branch="all", order="desc")
    assert await paged(kept, user, backwards) == everything[::-1]


async def paged(kept: Stores, user: str, window: Window) -> list[str]:
    """Every message of a window's kind, a page at a time."""
    found: list[Message] = []
    while page := await kept.storage.messages(user, "t", window):
        assert len(page) <= window.limit
        assert page[0] not in found
        found += page
        window = replace(window, after=page[-1].position)
    return [message.id for message in found]


async def test_a_path_through_many_branches(kept: Stores, user: str) -> None:
    """Each message has a sibling, so that every step of the path is a branch of its own."""
    parent, path, chain = None, [], list[Message]()
    for n in range(MAX_BRANCHES + 1):
        chain += [said(f"x{n}", parent=parent), said(f"y{n}", parent=parent or "x0")]
        parent = f"y{n}"
        path.append(parent)
    await kept.storage.add_messages(user, chain, create=True)
    path.insert(0, "x0")
    assert await ids(kept, user, Window(limit=5, order="desc")) == path[:-6:-1]
    assert await ids(kept, user, Window(limit=5)) == path[:5]
    assert await ids(kept, user, Window(limit=2000)) == path
    assert await ids(kept, user, Window(limit=1000, order="desc")) == path[::-1]
    await add(kept, user, "on", parent=parent)
    count = (await kept.storage.thread(user, "t")).message_count
    edit = [said("on2", parent="on"), said("edit", parent=parent)]
    with pytest.raises(InvalidMessage):
        await kept.storage.add_messages(user, edit)
    assert (await kept.storage.thread(user, "t")).message_count == count
    assert (await add(kept, user, "on2"))[0].parent_id == "on"
    await add(kept, user, "other", parent=path[5])


async def test_the_newest_window(kept: Stores, user: str) -> None:
    await add(kept, user, *(f"m{n}" for n in range(10)))
    await add(kept, user, "e1", "e2", parent="m4")
    assert await ids(kept, user, Window(limit=3, order="desc")) == ["e2", "e1", "m4"]
    assert await ids(kept, user, Window(limit=1, order="desc")) == ["e2"]
    assert await ids(kept, user, Window(limit=1, order="desc", leaf="m9")) == ["m9"]
    assert await ids(kept, user, Window(limit=2, order="desc", leaf="m9")) == ["m9", "m8"]
    assert await ids(kept, user, Window(limit=2, order="asc", leaf="m9")) == ["m0", "m1"]


async def test_a_thread_without_messages_has_an_empty_page(kept: Stores, user: str) -> None:
    await kept.storage.create_thread(user, Thread(id="t"))
    for branch in ("all", "current"):
        for order in ("asc", "desc"):
            window = Window(limit=3, branch=branch, order=order)  # type: ignore[arg-type]
            assert await ids(kept, user, window) == []
    with pytest.raises(NotFound):
        await ids(kept, user, PATH, "nowhere")
    with pytest.raises(NotFound):
        await ids(kept, user, ALL, "nowhere")


async def test_threads_come_newest_activity_first_in_pages(kept: Stores, user: str) -> None:
    for n in range(7):
        await kept.storage.create_thread(user, Thread(id=f"t{n}"))
    await add(kept, user, "m", thread="t2")
    order = ["t2", "t6", "t5", "t4", "t3", "t1", "t0"]
    found: list[Thread] = []
    after = None
    while page := await kept.storage.threads(user, query=None, after=after, limit=2):
        assert len(page) <= 2
        found += page
        after = (page[-1].updated_at, page[-1].id)
    assert [thread.id for thread in found] == order
    moments = [thread.updated_at for thread in found]
    assert moments == sorted(moments, reverse=True)


async def test_threads_of_one_moment_are_paged_once_each(kept: Stores, user: str) -> None:
    moment = now()
    made = {f"t{n}" for n in range(9)}
    for thread in made:
        await kept.storage.create_thread(
            user, Thread(id=thread, created_at=moment, updated_at=moment)
        )
    found, after = list[str](), None
    while page := await kept.storage.threads(user, query=None, after=after, limit=2):
        found += [thread.id for thread in page]
        after = (page[-1].updated_at, page[-1].id)
    assert len(found) == 9
    assert set(found) == made


async def test_users_do_not_see_each_other(kept: Stores, user: str) -> None:
    other = unique("user")
    await add(kept, user, "m")
    await kept.storage.create_thread(user, Thread(id="mine"))
    await add(kept, other, "m", "n")
    assert await listed(kept, other) == ["t"]
    assert len(await kept.storage.messages(user, "t", ALL)) == 1
    for attempt in (
        kept.storage.thread(other, "mine"),
        kept.storage.update_thread(other, "mine", {"title": "stolen"}),
        kept.storage.delete_thread(other, "mine"),
        kept.storage.messages(other, "mine", ALL),
        kept.storage.add_messages(other, [said("x", "mine")]),
        kept.storage.set_feedback(user, "t", "n", {"score": 1}),
    ):
        with pytest.raises(NotFound):
            await attempt
    await kept.storage.delete_thread(other, "t")
    assert await ids(kept, user, ALL) == ["m"]


async def test_titles(kept: Stores, user: str) -> None:
    await kept.storage.create_thread(user, Thread(id="t"))
    assert (await kept.storage.thread(user, "t")).title is None
    await add(kept, user, "m")
    assert (await kept.storage.thread(user, "t")).title == "text of m"
    await add(kept, user, "n")
    assert (await kept.storage.thread(user, "t")).title == "text of m"
    changed = await kept.storage.update_thread(user, "t", {"title": "Mine"})
    assert (changed.title, changed.message_count) == ("Mine", 2)
    kept_title = await kept.storage.update_thread(user, "t", {"title": "x"}, only_untitled=True)
    assert kept_title.title == "Mine"
    assert (await kept.storage.update_thread(user, "t", {"metadata": {"a": 1}})).title == "Mine"
    again = await kept.storage.update_thread(user, "t", {"title": None})
    assert (again.title, again.metadata) == ("text of m", {"a": 1})
    made = await kept.storage.update_thread(user, "t", {"title": "Made"}, only_untitled=True)
    assert made.title == "Made"
    assert await kept.storage.update_thread(user, "t", {}) == made


async def test_a_title_is_one_short_line(kept: Stores, user: str) -> None:
    long = said("m", content="a  first\nline and " + "word " * 100)
    await kept.storage.add_messages(user, [long], create=True)
    title = (await kept.storage.thread(user, "t")).title
    assert title is not None
    assert title.startswith("a first line and word word")
    assert len(title) <= 80
    assert title.endswith("…")
    parts = [{"type": "image_url", "image_url": {"url": "https://x.example/"}}]
    await kept.storage.add_messages(user, [said("m", "pictures", content=parts)], create=True)
    assert (await kept.storage.thread(user, "pictures")).title is None
    await add(kept, user, "n", thread="pictures")
    assert (await kept.storage.thread(user, "pictures")).title == "text of n"


@pytest.mark.parametrize("branch", ["all", "current"])
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_ends_with_the_message_that_passes_its_characters(
    kept: Stores, user: str, branch: Any, order: Any
) -> None:
    sizes = [100, 50, 1000, 1, 1, 1, 3000, *([10] * 60)]
    chain = [said(f"m{n}", content="x" * size) for n, size in enumerate(sizes)]
    chain[4] = replace(chain[4], content=[{"type": "text", "text": "x" * 500}])
    chain[5] = replace(chain[5], reasoning="y" * 400)
    await kept.storage.add_messages(user, chain, create=True)
    weigh = [*sizes[:4], len('[{"type":"text","text":""}]') + 500, 401, *sizes[6:]]
    for chars in (0, 149, 150, 151, 1151, 1152, 2079, 2080, 5000, 10_000):
        found = await kept.storage.messages(
            user, "t", Window(limit=200, order=order, branch=branch, max_chars=chars)
        )
        total, expected = 0, 0
        for weight in weigh if order == "asc" else weigh[::-1]:
            total, expected = total + weight, expected + 1
            if total > chars:
                break
        assert len(found) == expected, chars
        numbers = range(len(sizes)) if order == "asc" else range(len(sizes) - 1, -1, -1)
        assert [m.id for m in found] == [f"m{n}" for n in numbers][:expected]
    small = Window(limit=30, order=order, branch=branch, max_chars=10**9)
    assert len(await kept.storage.messages(user, "t", small)) == 30
    assert await paged(kept, user, replace(small, max_chars=900)) == [
        f"m{n}" for n in (range(67) if order == "asc" else range(66, -1, -1))
    ]


async def test_feedback_is_set_and_cleared(kept: Stores, user: str) -> None:
    await add(kept, user, "m", "n")
    feedback = {"score": -1, "comment": "ü"}
    await kept.storage.set_feedback(user, "t", "n", feedback)
    found = await kept.storage.messages(user, "t", ALL)
    assert [message.feedback for message in found] == [None, feedback]
    await kept.storage.set_feedback(user, "t", "n", None)
    assert (await kept.storage.messages(user, "t", ALL))[1].feedback is None
    for thread, message in (("t", "nowhere"), ("nowhere", "n")):
        with pytest.raises(NotFound):
            await kept.storage.set_feedback(user, thread, message, feedback)


async def test_a_deleted_thread_leaves_nothing(kept: Stores, user: str) -> None:
    await add(kept, user, "m", "n")
    await kept.storage.delete_thread(user, "t")
    for attempt in (
        kept.storage.thread(user, "t"),
        kept.storage.messages(user, "t", ALL),
        kept.storage.delete_thread(user, "t"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await listed(kept, user) == []
    assert await listed(kept, user, "text") == []
    assert await exported(kept, user) == []
    again = await add(kept, user, "m")
    assert (again[0].position, again[0].parent_id) == (1, None)
    assert await ids(kept, user, ALL) == ["m"]


async def test_a_thread_comes_back_while_it_is_deleted(kept: Stores, user: str) -> None:
    chain = [said("m0", content="first life " * 3000)]
    chain += [said(f"m{n}", parent=f"m{n - 1}", content="old " * 3000) for n in range(1, 120)]
    await kept.storage.add_messages(user, chain, create=True)
    deletion = asyncio.ensure_future(kept.storage.delete_thread(user, "t"))
    await eventually_gone(kept, user)
    again, made = await asyncio.gather(
        add(kept, user, "m0"),
        kept.storage.create_thread(user, Thread(id="t")),
        return_exceptions=True,
    )
    await deletion
    assert isinstance(again, list)
    assert isinstance(made, IdConflict | Thread)
    assert again[0].position == 1
    assert await ids(kept, user, ALL) == ["m0"]
    assert await listed(kept, user, "old") == []
    assert len(await exported(kept, user)) == 2


async def eventually_gone(kept: Stores, user: str) -> None:
    async with asyncio.timeout(20):
        while await listed(kept, user):
            await asyncio.sleep(0)


async def test_a_deletion_whose_caller_went_away_is_finished_by_a_sweep(
    kept: Stores, user: str
) -> None:
    chain = [said(f"m{n}", content="secret " * 3000) for n in range(100)]
    await kept.storage.add_messages(user, chain, create=True)
    deletion = asyncio.ensure_future(kept.storage.delete_thread(user, "t"))
    await eventually_gone(kept, user)
    deletion.cancel()
    await asyncio.gather(deletion, return_exceptions=True)
    for attempt in (
        kept.storage.messages(user, "t", Window(limit=1, order="desc", leaf="m99")),
        kept.storage.set_feedback(user, "t", "m99", {"score": 1}),
        kept.storage.add_messages(user, [said("n")]),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await exported(kept, user) == []
    assert await listed(kept, user, "secret") == []
    long_ago = now() - timedelta(days=5000)
    while await kept.user_data.expire(long_ago, 10) == 10:
        pass
    again = await add(kept, user, "m")
    assert again[0].position == 1


async def test_search_finds_words_in_titles_and_text(kept: Stores, user: str) -> None:
    other = unique("user")
    await kept.storage.create_thread(user, Thread(id="titled", title="Sailing to Byzantium"))
    await add(kept, user, "m", thread="plain")
    long = "filler " * 500 + "Kingfisher at the end"
    await kept.storage.add_messages(user, [said("m", "long", content=long)], create=True)
    parts = [{"type": "text", "text": "a heron"}, {"type": "text", "text": "and an Ibis"}]
    await kept.storage.add_messages(user, [said("m", "parts", content=parts)], create=True)
    secret = said("m", "secret", content="kingfisher heron byzantium secretword")
    await kept.storage.add_messages(other, [secret], create=True)
    for query, found in {
        "byzantium": ["titled"],
        "BYZ": ["titled"],
        "to sail": ["titled"],
        "sail heron": [],
        "kingfisher": ["long"],
        "end kingf": ["long"],
        "fisher": ["long"],
        "ibis heron": ["parts"],
        "ing": ["long", "titled"],
        "in": ["long", "titled"],
        "g": ["long", "titled"],
        "secretword": [],
        "text of": ["plain"],
        "": ["parts", "long", "plain", "titled"],
        "   ": [],
        "...": [],
        "the nothing": [],
    }.items():
        assert await listed(kept, user, query) == found, query
    assert await listed(kept, other, "kingfisher") == ["secret"]
    assert await listed(kept, other, "sail") == []


async def test_search_follows_changes(kept: Stores, user: str) -> None:
    await kept.storage.create_thread(user, Thread(id="t", title="Alpha"))
    assert await listed(kept, user, "alpha") == ["t"]
    await kept.storage.update_thread(user, "t", {"title": "Beta"})
    assert await listed(kept, user, "alpha") == []
    assert await listed(kept, user, "beta") == ["t"]
    await kept.storage.update_thread(user, "t", {"title": None})
    assert await listed(kept, user, "beta") == []


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("write to ada@example.com today", "ada@example.com"),
        ("write to ada@example.com today", "example"),
        ("open https://example.com/guide/setup?x=1 now", "guide setup"),
        ("it costs 3.14 euros", "3.14"),
        ("release v1.2.3-rc1", "v1.2.3"),
        ("read the file notes.txt", "notes.txt"),
        ("a well-known fact", "known"),
        ("a well-known fact", "well-known"),
        ("call my_function(x)", "my_function"),
        ("it isn't so", "isn't"),
        ("-5 degrees", "-5"),
        ("die Straße", "Straße"),
        ("ÜBER ALLES", "über"),
        ("МОСКВА слезам", "москва"),
        ("she said “hello” — and left", "hello"),
        ("her naïve café", "café"),
        ("東京 タワー", "東京"),
        ("a/b/c and d", "a/b/c"),
        ("<b>bold</b> words", "bold"),
    ],
)
async def test_search_finds_what_was_written(
    kept: Stores, user: str, text: str, query: str
) -> None:
    await kept.storage.add_messages(user, [said("m", content=text)], create=True)
    assert await listed(kept, user, query) == ["t"]


@pytest.mark.parametrize(
    "query",
    [
        '"',
        "'",
        '"alpha',
        "alpha AND nothing",
        "alpha NOT beta",
        "alpha OR nothing",
        "NEAR(alpha beta)",
        "body:nothing",
        "owner : 31",
        "!alpha",
        "nothing | alpha",
        "alpha <-> nothing",
        ":*",
        "(",
        "\\",
        "%",
        "_",
        "²",
        "^alpha nothing",
        "alpha' ; DROP TABLE chat_threads; --",
        "{a b}: c",
        "+ - * /",
    ],
)
async def test_operators_of_search_engines_are_plain_text(
    kept: Stores, user: str, query: str
) -> None:
    await kept.storage.add_messages(user, [said("m", content="alpha beta")], create=True)
    assert await listed(kept, user, query) == []
    exact = said("m", "exact", content=f"they wrote {query} here")
    await kept.storage.add_messages(user, [exact], create=True)
    assert await listed(kept, user, query) == ["exact"]


@pytest.mark.parametrize(
    ("text", "query", "absent"),
    [
        ("it is 100% done", "100%", "100%%"),
        ("call a_b now", "a_b", "a-b"),
        ("def f(x): return", "def f(", "f)"),
        ("他说你好世界", "你好", "好你"),
        ("他说你好世界", "界", "国"),
        ("สวัสดีครับ", "สดี", "ดีส"),
        ("well done 👍🏽", "👍", "👎"),
        ("die STRASSE", "straße", "straat"),
        ("ΟΔΥΣΣΕΥΣ", "οδυσσευς", "οδυσσεα"),
        ("ПРИВЕТ мир", "привет МИР", "пока"),
        ("İSTANBUL'DA", "istanbul", "ankara"),
        ("ISPARTA", "ısparta", "izmir"),
        ("a C++ and C# book", "c++ c#", "c--"),
        ("the end.", "d.", "d,"),
        ("a/b\\c", "b\\c", "b/c"),
        ("one two", "two one", "one three"),
        ("tab\tand\nline", "tab line", "tab\tlines"),
    ],
)
async def test_search_in_any_script(
    kept: Stores, user: str, text: str, query: str, absent: str
) -> None:
    await kept.storage.add_messages(user, [said("m", content=text)], create=True)
    await kept.storage.create_thread(user, Thread(id="titled", title=text))
    await kept.storage.add_messages(user, [said("m", "other", content="unlike")], create=True)
    for wanted in (query, query.upper(), query.lower()):
        assert await listed(kept, user, wanted) == ["titled", "t"], wanted
    assert await listed(kept, user, absent) == []


async def test_all_pieces_are_in_one_message_or_in_the_title(kept: Stores, user: str) -> None:
    await kept.storage.create_thread(user, Thread(id="t", title="Alpha"))
    await kept.storage.add_messages(
        user, [said("m", content="beta gamma"), said("n", content="delta", parent="m")]
    )
    assert await listed(kept, user, "gamma bet") == ["t"]
    for apart in ("alpha beta", "beta delta", "al ga", "b d"):
        assert await listed(kept, user, apart) == [], apart


async def test_a_message_is_searched_in_its_first_64_k(kept: Stores, user: str) -> None:
    text = "x" * (SEARCHED_CHARS - 5) + "early" + "later"
    await kept.storage.add_messages(user, [said("m", content=text)], create=True)
    assert await listed(kept, user, "early") == ["t"]
    assert await listed(kept, user, "later") == []
    assert await listed(kept, user, "yl") == []


async def test_a_search_comes_in_pages(kept: Stores, user: str) -> None:
    for n in range(9):
        await kept.storage.add_messages(
            user, [said("m", f"t{n}", content=f"needle {n}")], create=True
        )
    for query in ("needle", "ee"):
        found, after = list[str](), None
        while page := await kept.storage.threads(user, query=query, after=after, limit=2):
            found += [thread.id for thread in page]
            after = (page[-1].updated_at, page[-1].id)
        assert found == [f"t{n}" for n in range(8, -1, -1)]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    text=st.text("aAbBßẞςσİıiI你好👍_%( \n", min_size=1, max_size=12),
    start=st.integers(0, 11),
    length=st.integers(1, 5),
    other=st.text("aAbBßẞςσİıiI你好👍_%(", min_size=1, max_size=4),
)
async def test_every_piece_of_any_text_is_found(
    kept: Stores, text: str, start: int, length: int, other: str
) -> None:
    user = unique("user")
    await kept.storage.add_messages(user, [said("m", content=text)], create=True)
    if piece := text[start : start + length].strip():
        for query in (piece, piece.swapcase()):
            if "\u0307" not in query:
                assert await listed(kept, user, query) == ["t"]
    expected = ["t"] if contains(text, pieces(other)) else []
    assert await listed(kept, user, other) == expected


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    query=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
)
async def test_any_text_can_be_searched_for(kept: Stores, query: str) -> None:
    assert await listed(kept, "nobody", query) == []


@pytest.mark.parametrize(
    "letters", ["ab-", "αβγδ-", "𐐨𐐩𐐪-", "abc/.@"], ids=["ascii", "two", "four", "urls"]
)
async def test_large_texts_of_many_words_are_stored(kept: Stores, user: str, letters: str) -> None:
    """As many different words as a message of 1 MiB can have."""
    marks = [c for c in letters if not c.isalnum()]
    alphabet = [chr(ord(letters[0]) + n) for n in range(20)]
    words, length = list[str](), 0
    numbers = iter(range(10**9))
    while length < 200_000:
        digits = next(numbers)
        spelled = ""
        for place in range(6):
            spelled += alphabet[digits // 20**place % 20]
            if place in (1, 3):
                spelled += marks[(place // 2) % len(marks)]
        words.append(spelled)
        length += len(spelled) + 1
    text = " ".join(words)
    await kept.storage.add_messages(user, [said("m", content=text)], create=True)
    assert (await kept.storage.messages(user, "t", PATH))[0].content == text


async def test_export_has_everything_of_one_user(kept: Stores, user: str) -> None:
    other = unique("user")
    await add(kept, user, "m", "n")
    await add(kept, user, "o", parent="m")
    await kept.storage.create_thread(user, Thread(id="empty", title="Ü", metadata={"a": 1}))
    await add(kept, other, "secret", thread="theirs")
    records = await exported(kept, user)
    threads = {r["id"]: r for r in records if r["type"] == "thread"}
    messages = {r["id"]: r for r in records if r["type"] == "message"}
    assert set(threads) == {"t", "empty"}
    assert set(messages) == {"m", "n", "o"}
    assert threads["t"]["message_count"] == 3
    assert threads["empty"] == {
        "type": "thread",
        **(await kept.storage.thread(user, "empty")).to_dict(None),
    }
    stored = {m.id: m.to_dict() for m in await kept.storage.messages(user, "t", ALL)}
    assert messages == {key: {"type": "message", **value} for key, value in stored.items()}


async def test_export_is_complete_for_many(kept: Stores, user: str) -> None:
    for n in range(3):
        chain = [said(f"m{n}.{i}", f"t{n}") for i in range(450)]
        await kept.storage.add_messages(user, chain, create=True)
    found = [r["id"] for r in await exported(kept, user) if r["type"] == "message"]
    assert len(found) == len(set(found)) == 1350


async def test_erase_leaves_nothing_of_one_user(kept: Stores, user: str) -> None:
    other = unique("user")
    for n in range(3):
        await add(kept, user, f"m{n}", thread=f"t{n}")
    await add(kept, other, "m")
    assert await kept.user_data.erase(user) == 3
    assert await exported(kept, user) == []
    assert await listed(kept, user, "text") == []
    assert await kept.user_data.erase(user) == 0
    assert await ids(kept, other, ALL) == ["m"]


async def test_erase_takes_runs_without_a_thread_along(kept: Stores, user: str) -> None:
    record = RunRecord(unique("run"), user, "gone", "u", "a")
    await kept.log.open(record)
    await kept.user_data.erase(user)
    assert await exported(kept, user) == []
    await kept.log.forget(user, "gone")


async def test_expire_takes_quiet_threads_a_bounded_number_at_a_time(
    kept: Stores, user: str
) -> None:
    # Every user's threads expire: what other tests have made is younger than a year.
    old = now() - timedelta(days=1000)
    for n in range(5):
        await kept.storage.create_thread(
            user, Thread(id=f"old{n}", created_at=old, updated_at=old + timedelta(seconds=n))
        )
    await add(kept, user, "m", thread="old4")
    await add(kept, user, "m", thread="young")
    before = now() - timedelta(days=365)
    assert await kept.user_data.expire(old, 10) == 0
    assert await kept.user_data.expire(before, 3) == 3
    assert await kept.user_data.expire(before, 3) == 1
    assert await kept.user_data.expire(before, 3) == 0
    assert sorted(await listed(kept, user)) == ["old4", "young"]


async def test_many_users_write_at_once(kept: Stores) -> None:
    users = [unique("user") for _ in range(10)]

    async def live(user: str) -> Sequence[Message]:
        await add(kept, user, "a", "b")
        await asyncio.gather(add(kept, user, "c"), kept.storage.thread(user, "t"))
        await kept.storage.set_feedback(user, "t", "a", {"score": 1})
        return await kept.storage.messages(user, "t", PATH)

    for found in await asyncio.gather(*map(live, users)):
        assert [message.id for message in found] == ["a", "b", "c"]
