"""The reference of the API, made from the OpenAPI document of a server with the bundled checkpoint."""

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
from fastapi import FastAPI

Schema = dict[str, Any]

TITLES = {"openai": "OpenAI", "hugging face": "Hugging Face", "kserve": "KServe"}  # of the groups of calls
SAMPLE = "POST /sample"  # other calls refer to its parameters
WORDS = {"string": "text", "boolean": "true or false", "array": "list", "binary": "file", "path": "path"}


def document() -> Schema:
    """Return the OpenAPI document of a server that serves the bundled checkpoint with default settings."""
    from tminus.service.access.access import Access
    from tminus.service.engine.loading import load_engine
    from tminus.service.engine.protocol import BUNDLED
    from tminus.service.jobs.store.async_store import Stores
    from tminus.service.jobs.store.sqlite_store import SqliteStore
    from tminus.service.startup.app import create_app
    from tminus.service.startup.loader import ModelLoader
    from tminus.service.startup.models import Prepared, ServedModels
    from tminus.service.startup.serve import Preparer
    from tminus.service.startup.settings import Library, Settings

    settings = Settings.model_construct(executor="eager")  # otherwise the defaults, whatever the environment says
    loaded = load_engine(settings.load_options(BUNDLED), places_of=lambda _: 1)  # which measures nothing
    limits = settings.limits(loaded.speed.max_rows, loaded.speed.policy.max_batch)
    model = Prepared(loaded.engine, limits, loaded.speed)
    served = ServedModels([model], Stores(lambda _: SqliteStore(None)), settings.allowed_sites(), Access())
    loader = ModelLoader(served, Library(), Preparer(settings).load)
    return asyncio.run(_document_of(create_app(served, loader)))


async def _document_of(app: FastAPI) -> Schema:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.get("/openapi.json")
    document: Schema = answer.raise_for_status().json()
    return document


def body() -> Iterator[str]:
    """Yield the calls by group, the headers of answers, and the JSON objects."""
    whole = document()
    schemas, headers = whole["components"]["schemas"], whole["components"]["headers"]
    paths = whole["paths"] | {path: {"ws": call} for path, call in whole["x-websockets"].items()}
    calls = {f"{method.upper()} {path}": call for path, methods in paths.items() for method, call in methods.items()}
    writer = Writer(schemas)
    yield whole["info"]["description"]
    for tag in whole["tags"]:
        yield f"\n## {TITLES.get(tag['name'], tag['name'].capitalize())}\n\n{tag['description']}\n"
        for name, call in calls.items():
            if call["tags"][0] == tag["name"]:
                said = dict.fromkeys((f"{call['summary']}.", call["description"]))  # some say the same
                yield f"\n### `{name}`\n\n{' '.join(said)}\n"
                yield from writer.call(call)
                if name == SAMPLE:
                    writer.of_sample = _parameters(call)
    yield "\n## Headers of answers\n"
    yield from writer.members({name: _described(headers[name]) for name in sorted(headers)})
    yield "\n## JSON objects\n"
    for name, schema in schemas.items():
        if "properties" in schema:
            yield f"\n### `{name}`\n\n{schema['description']}\n"
            yield from writer.members(schema["properties"])


def _parameters(call: Schema) -> dict[str, Schema]:
    """Return what a call takes besides its path and `API-Version`, which is a reference."""
    return {each["name"]: _described(each) for each in call.get("parameters", []) if each.get("in", "path") != "path"}


def _described(parameter: Schema) -> Schema:
    """Return the schema of a parameter or header, with its description."""
    return {"description": parameter["description"], **parameter["schema"]}


class Writer:
    """Writes parts of an OpenAPI document as Markdown."""

    def __init__(self, schemas: Schema) -> None:
        """schemas: the named ones that others refer to."""
        self._schemas = schemas
        self.of_sample: dict[str, Schema] = {}  # parameters of POST /sample: elsewhere their names are enough

    def call(self, call: Schema) -> Iterator[str]:
        """Yield what a call takes and answers, and the messages that follow."""
        members, body = _parameters(call), call.get("requestBody", {}).get("content", {})
        for each in body.values():
            members |= each["schema"].get("properties", {})
        yield from self.members(members)
        answers: Schema = call.get("responses", {})
        lines = [f"Body: {self.media_types(body)}"] if body else []
        for status, answer in answers.items():
            if status < "4":
                said = answer["description"].removeprefix("Successful Response")  # which FastAPI says by itself
                parts = filter(None, (said, self.media_types(answer.get("content", {}))))
                lines.append(f"{status}: {'. '.join(parts) or 'done'}")
        if answers:
            lines.append(f"[Errors](reference/errors.md): {', '.join(status for status in answers if status >= '4')}")
        yield "\n" + "".join(f"- {line}\n" for line in lines)
        yield from self.messages("From the client", call.get("client", {}))
        yield from self.messages("From the server", call.get("server", {}))
        for answer in answers.values():
            yield from self.messages("Event", answer.get("x-events", {}))

    def messages(self, kind: str, messages: Schema) -> Iterator[str]:
        """Yield messages or events, each with its members."""
        for name, each in messages.items():
            then = f" Then comes {each['followed_by']}." if "followed_by" in each else ""
            has = f" It is a {self.values(each['schema'])}." if "$ref" in each["schema"] else ""
            yield f"\n{kind}: **`{name}`**. {each['description']}{then}{has}\n"
            yield from self.members(each["schema"].get("properties", {}))

    def members(self, members: dict[str, Schema]) -> Iterator[str]:
        """Yield parameters, or the members of an object, as a table."""
        known = {name: each["description"] for name, each in self.of_sample.items()}
        same = [name for name, each in members.items() if known.get(name) == each.get("description", "")]
        if len(same) < len(members):
            yield "\n| name | values | meaning |\n|---|---|---|\n"
        for name, each in members.items():
            if name not in same:
                meaning = " ".join(each.get("description", "").split()).replace("|", "\\|")
                yield f"| `{name}` | {self.values(each)} | {meaning} |\n"
        if same:
            yield f"\nAs in [`{SAMPLE}`](#post-sample): {', '.join(f'`{name}`' for name in same)}.\n"

    def media_types(self, content: Schema) -> str:
        """Return media types, each with the JSON object that it has."""
        objects = {kind: self.values(each.get("schema", {})) for kind, each in content.items()}
        return ", ".join(f"`{kind}`" + (f" ({value})" if "](" in value else "") for kind, value in objects.items())

    def values(self, schema: Schema) -> str:
        """Say in words which values a schema allows."""
        match schema:
            case {"$ref": str(reference)}:
                name = reference.rpartition("/")[2]
                named = self._schemas[name]
                return self.values(named) if "enum" in named else f"[{name}](#{name.lower()})"
            case {"const": value}:
                return f"`{value}`"
            case {"enum": choices}:
                return ", ".join(f"`{choice}`" for choice in choices)
            case {"anyOf": options}:
                return " or ".join(dict.fromkeys(map(self.values, options)))
            case {"items": dict(items)} if items:
                return f"list of {self.values(items)}"
            case {"type": "object", "additionalProperties": dict(each)}:
                return f"object of {self.values(each)}"
            case {"type": str(kind)}:
                word = WORDS.get(schema.get("format", kind)) or WORDS.get(kind, kind)
                return word + bounds(*map(schema.get, ("exclusiveMinimum", "minimum", "maximum")))
        return "any"


def bounds(above: float | None, least: float | None, most: float | None) -> str:
    """Return the bounds of a number in words. Empty where there are none."""
    if above is not None:
        return f" above {digits(above)}" + (f" and at most {digits(most)}" if most is not None else "")
    if least is not None:
        return f" from {digits(least)} to {digits(most)}" if most is not None else f", {digits(least)} or more"
    return ""


def digits(number: float) -> str:
    """Return a number with commas between its thousands, and without a fraction of 0."""
    return f"{int(number) if int(number) == number else number:,}"
