"""The web chat's conversations: tables, search, and the routes under /web/conversations.

A conversation is a tree of messages that the page makes and names (UUIDs); ``head`` is the end of
the branch that is shown. The page writes a message whenever it changes, so every write replaces
what it names and may be repeated. Nothing of one owner can be read, found or changed by another:
to them it does not exist.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import JSON, ForeignKey, Text, delete, or_, select, tuple_
from sqlalchemy.orm import Mapped, Session, mapped_column
from starlette.responses import Response, StreamingResponse

from .database import Base, Database, Timestamp
from .wire import ApiError, dumps, read_json

PAGE = 40  # conversations in one answer of the list
AROUND = 48  # characters of a message shown before what was found in it

Id = Annotated[str, Field(pattern="^[A-Za-z0-9-]{1,64}$")]
Owner = Callable[[Request], str]


class Conversation(Base):
    __tablename__ = "conversation"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    title: Mapped[str] = mapped_column(Text, default="")
    folded: Mapped[str] = mapped_column(Text, default="")  # the title, for searching
    settings: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    head: Mapped[str | None]
    created: Mapped[datetime] = mapped_column(Timestamp)
    changed: Mapped[datetime] = mapped_column(Timestamp, index=True)


class Message(Base):
    __tablename__ = "conversation_message"
    conversation_id: Mapped[str] = mapped_column(
        ForeignKey("conversation.id", ondelete="CASCADE"), primary_key=True
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    parent: Mapped[str | None]
    role: Mapped[str]
    content: Mapped[str] = mapped_column(Text)
    folded: Mapped[str] = mapped_column(Text)  # the content and file names, for searching
    details: Mapped[dict[str, Any]] = mapped_column(JSON)  # as the page made them
    created: Mapped[datetime] = mapped_column(Timestamp)


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


_B = TypeVar("_B", bound=_Body)


class ConversationBody(_Body):
    """What is there replaces what was stored; what is missing stays."""

    title: Annotated[str, Field(max_length=200)] | None = None
    settings: dict[str, Any] | None = None
    head: Id | None = None


class MessageBody(ConversationBody):
    """A message, and with it what changed about its conversation: written together."""

    parent: Id | None = None
    role: Literal["user", "assistant", "tool"]
    content: str
    details: dict[str, Any] = Field(default_factory=dict)


class _Ids(_Body):
    id: Id
    message_id: Id


def now() -> datetime:
    return datetime.now(timezone.utc)


class Conversations:
    """The conversations in ``database``. Every method works on those of ``owner`` alone."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = now) -> None:
        self._database, self._clock = database, clock

    async def listed(self, owner: str, search: str = "", after: str | None = None) -> Any:
        """One page of the list, last changed first, and the cursor ``next`` of the one after it.

        ``search`` finds titles, contents and file names, in any case, in every branch.
        """
        wanted = search.casefold()

        def work(session: Session) -> Any:
            query = select(Conversation).where(Conversation.owner == owner)
            if wanted:
                inside = select(Message.conversation_id).where(
                    Message.folded.contains(wanted, autoescape=True)
                )
                query = query.where(
                    or_(
                        Conversation.folded.contains(wanted, autoescape=True),
                        Conversation.id.in_(inside),
                    )
                )
            if after is not None:
                query = query.where(
                    tuple_(Conversation.changed, Conversation.id) < tuple_(*_cursor(after))
                )
            order = (Conversation.changed.desc(), Conversation.id.desc())
            found = session.scalars(query.order_by(*order).limit(PAGE + 1)).all()
            shown, more = found[:PAGE], len(found) > PAGE
            entries = [_entry(c) for c in shown]
            if wanted:
                for entry, conversation in zip(entries, shown, strict=True):
                    entry["snippet"] = _snippet(session, conversation, wanted)
            last = f"{shown[-1].changed.isoformat()} {shown[-1].id}" if more else None
            return {"conversations": entries, "next": last}

        return await self._database.run(work)

    async def one(self, owner: str, id: str) -> dict[str, Any]:
        """A conversation and all its messages. Raises ApiError 404."""

        def work(session: Session) -> dict[str, Any]:
            return _whole(session, _found(session, owner, id))

        return await self._database.run(work)

    async def put(self, owner: str, id: str, body: ConversationBody) -> None:
        """Change a conversation. Raises ApiError 404."""

        def work(session: Session) -> None:
            _change(_found(session, owner, id), body)

        await self._database.run(work, write=True)

    async def put_message(self, owner: str, id: str, message_id: str, body: MessageBody) -> None:
        """Write a message, and make its conversation if this is its first.

        Raises ApiError 404 when the conversation is another owner's.
        """

        def work(session: Session) -> None:
            time = self._clock()
            conversation = session.get(Conversation, id)
            if conversation is None:
                conversation = Conversation(id=id, owner=owner, created=time, changed=time)
                session.add(conversation)
                session.flush()
            elif conversation.owner != owner:
                raise _missing(id)
            _change(conversation, body)
            conversation.changed = time
            message = session.get(Message, (id, message_id))
            if message is None:
                message = Message(conversation_id=id, id=message_id, created=time)
                session.add(message)
            names = [f.get("name", "") for f in body.details.get("files", [])]
            message.parent, message.role = body.parent, body.role
            message.content, message.details = _storable(body.content), body.details
            message.folded = "\n".join([message.content, *map(str, names)]).casefold()

        await self._database.run(work, write=True)

    async def delete(self, owner: str, id: str) -> None:
        """Delete a conversation and its messages. Raises ApiError 404."""

        def work(session: Session) -> None:
            conversation = _found(session, owner, id)
            session.execute(delete(Message).where(Message.conversation_id == id))
            session.delete(conversation)

        await self._database.run(work, write=True)

    async def export(self, owner: str) -> AsyncGenerator[str, None]:
        """All conversations as the pieces of one JSON document, one conversation at a time."""
        query = select(Conversation.id).where(Conversation.owner == owner)
        ids: Sequence[str] = await self._database.run(
            lambda session: session.scalars(query.order_by(Conversation.created)).all()
        )
        lead = '{"conversations":[\n'
        for id in ids:
            try:
                whole = await self.one(owner, id)
            except ApiError:  # deleted meanwhile
                continue
            yield lead + dumps(whole)
            lead = ",\n"
        yield "\n]}\n" if lead == ",\n" else lead + "]}\n"


async def _read(request: Request, kind: type[_B]) -> _B:
    return _valid(kind, await read_json(request))


def _valid(kind: type[_B], data: dict[str, Any]) -> _B:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ApiError(f"{where}: {problem['msg']}") from error


def _found(session: Session, owner: str, id: str) -> Conversation:
    conversation = session.get(Conversation, id)
    if conversation is None or conversation.owner != owner:
        raise _missing(id)
    return conversation


def _missing(id: str) -> ApiError:
    return ApiError(f"There is no conversation {id}.", 404)


def _change(conversation: Conversation, body: ConversationBody) -> None:
    if body.title is not None:
        conversation.title = _storable(body.title)
        conversation.folded = conversation.title.casefold()
    if body.settings is not None:
        conversation.settings = body.settings
    if body.head is not None:
        conversation.head = body.head


def _storable(text: str) -> str:
    return text.replace("\0", "\ufffd")  # which PostgreSQL cannot store


def _entry(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": conversation.id,
        "title": conversation.title,
        "created": _milliseconds(conversation.created),
        "changed": _milliseconds(conversation.changed),
    }


def _whole(session: Session, conversation: Conversation) -> dict[str, Any]:
    query = select(Message).where(Message.conversation_id == conversation.id)
    messages = session.scalars(query.order_by(Message.created, Message.id)).all()
    return {
        **_entry(conversation),
        "settings": conversation.settings,
        "head": conversation.head,
        "messages": [
            {
                **m.details,
                "id": m.id,
                "parent": m.parent,
                "role": m.role,
                "content": m.content,
                "created": _milliseconds(m.created),
            }
            for m in messages
        ],
    }


def _snippet(session: Session, conversation: Conversation, wanted: str) -> str:
    """The surroundings of what was found, or "" when only the title has it."""
    query = select(Message.content).where(
        Message.conversation_id == conversation.id,
        Message.folded.contains(wanted, autoescape=True),
    )
    for content in session.scalars(query.order_by(Message.created.desc())):
        at = content.casefold().find(wanted)
        if at >= 0:
            start = max(0, at - AROUND)
            piece = content[start : at + len(wanted) + 2 * AROUND]
            return ("…" if start else "") + " ".join(piece.split())
    return ""


def _milliseconds(time: datetime) -> int:
    return round(time.timestamp() * 1000)


def _cursor(text: str) -> tuple[datetime, str]:
    time, _, id = text.partition(" ")
    try:
        return datetime.fromisoformat(time), id
    except ValueError as error:
        raise ApiError(
            f"`after` must be what `next` said on the page before, not {text}."
        ) from error


def conversation_routes(conversations: Conversations, owner: Owner) -> APIRouter:
    """The routes of the page; ``owner`` says whose conversations a request is about."""
    router = APIRouter(prefix="/web/conversations")

    @router.get("")
    async def listed(request: Request, search: str = "", after: str | None = None) -> Any:
        return await conversations.listed(owner(request), search, after)

    @router.get("/export")
    async def export(request: Request) -> Response:
        headers = {"Content-Disposition": 'attachment; filename="conversations.json"'}
        pieces = conversations.export(owner(request))
        return StreamingResponse(pieces, media_type="application/json", headers=headers)

    @router.get("/{id}")
    async def one(request: Request, id: str) -> dict[str, Any]:
        return await conversations.one(owner(request), id)

    @router.put("/{id}")
    async def put(request: Request, id: str) -> dict[str, Any]:
        await conversations.put(owner(request), id, await _read(request, ConversationBody))
        return {"id": id}

    @router.put("/{id}/messages/{message_id}")
    async def put_message(request: Request, id: str, message_id: str) -> dict[str, Any]:
        who = owner(request)  # before the body is read
        body = await _read(request, MessageBody)
        ids = _valid(_Ids, {"id": id, "message_id": message_id})
        await conversations.put_message(who, ids.id, ids.message_id, body)
        return {"id": message_id}

    @router.delete("/{id}")
    async def remove(request: Request, id: str) -> dict[str, Any]:
        await conversations.delete(owner(request), id)
        return {"id": id}

    return router
