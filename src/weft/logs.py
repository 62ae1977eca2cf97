"""How log lines look. One line a change of state, its facts as key=value in the message; as JSON
the same facts are fields. No prompt and no answer is ever logged."""

import json
import logging
import os
import re
from datetime import UTC, datetime

FORMATS = ("text", "json")
VARIABLE = "WEFT_LOG_FORMAT"
"""Set by the server for its workers."""

_FIELD = re.compile(r"(?:^| )([a-z][a-z0-9_]*)=(\S+)")
_LAST = ("reason", "error")
"""Fields that hold the rest of the line."""


def fields_of(message: str) -> dict[str, str]:
    """The key=value facts of a message; `reason` and `error` run to its end."""
    found: dict[str, str] = {}
    for match in _FIELD.finditer(message):
        if match[1] in _LAST:
            found[match[1]] = message[match.start(2) :]
            break
        found[match[1]] = match[2]
    return found


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the message's facts."""

    def __init__(self, label: str = "") -> None:
        super().__init__()
        self._label = label

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        line: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if self._label:
            line["process"] = self._label
        line |= {key: value for key, value in fields_of(message).items() if key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str = "info", form: str | None = None, label: str = "") -> None:
    """Log to standard error. `form`: one of FORMATS; None: what the server that started us uses.
    Does nothing where logging was configured before."""
    if form is not None:
        os.environ[VARIABLE] = form
    handler = logging.StreamHandler()
    if os.environ.get(VARIABLE) == "json":
        handler.setFormatter(JsonFormatter(label))
    else:
        name = f"{label} " if label else ""
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
