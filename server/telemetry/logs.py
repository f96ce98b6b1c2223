"""Logs as JSON lines, or as text for people; what other libraries log comes out in the same form."""

import logging
import sys
from typing import Any, Literal

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Format = Literal["json", "text"]


def make_log(form: Format) -> FilteringBoundLogger:
    """A logger to stderr, for the server's own lines."""
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[*_shared(), *_last(form)],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        context_class=dict,
    )
    return log


def capture_logging(form: Format) -> None:
    """Bring what is logged by the standard library's module (uvicorn, SQLAlchemy, our own parts) into the same form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_name_and_level, *_shared()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_last(form)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("server").setLevel(logging.INFO)


def default_format() -> Format:
    """Text for people at a terminal, JSON for programs."""
    return "text" if sys.stderr.isatty() else "json"


def _shared() -> list[Processor]:
    return [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True), _order]


def _last(form: Format) -> list[Processor]:
    if form == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_dump)]
    return [
        _without_what_is_empty,
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback),
    ]


def _order(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """When, how bad and what come first: for who reads the lines as they are."""
    return {name: event.pop(name) for name in ("timestamp", "level", "event")} | dict(event)


def _dump(event: object, **_: Any) -> str:
    return orjson.dumps(event, default=str).decode()


def _name_and_level(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    record: logging.LogRecord = event["_record"]
    return {**event, "logger": record.name}


def _without_what_is_empty(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    return {name: value for name, value in event.items() if value not in ("", 0)}
