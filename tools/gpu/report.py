"""The report: one .json with everything, one .md for people. Both are written whole at each change.

Whatever ends the run, the files hold all that was found before.
"""

import datetime
import json
import threading
from collections.abc import Iterable
from pathlib import Path

from svit.files import atomic_write

from .items import Item
from .machine import IDENTITY

FORMAT = 1
LONGEST_TEXT = 300  # of a cell of a table; the .json has all of it

# What becomes of an item. One that is cut or left out is done by a run that goes on from the report.
OK, FAILED, CRASHED, HUNG, CUT, LEFT_OUT = "ok", "failed", "crashed", "hung", "cut", "left out"
DONE = (OK, FAILED, CRASHED, HUNG)
BAD = (FAILED, CRASHED, HUNG)


class ReportError(ValueError):
    """A report that this run cannot go on from; the message says why."""


def text_of(value: object) -> str:
    """A figure as people read it: four digits, no exponent where there need not be one. A text is one short line."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "ok" if value else "WRONG"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


def table(rows: list[dict]) -> str:
    """Rows with the same keys as a table of Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([text_of(row[key]).replace("|", "\\|") for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(rows: Iterable[dict]) -> str:
    """Rows of any keys: a table for each set of keys, in the order in which they first came."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row), []).append(row)
    return "\n\n".join(table(group) for group in groups.values())


class Report:
    """What is known so far. Safe to use from several threads.

    Args:
        path: of the files, without their suffixes.
        about: what `machine.describe` says.
        rehearsal: whether no figure counts.
        missing: what is not installed, and what is left out therefore.
    """

    def __init__(self, path: Path, about: dict[str, str], rehearsal: bool, missing: dict[str, str]) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.data = {
            "format": FORMAT,
            "rehearsal": rehearsal,
            "about": about,
            "missing": missing,
            "runs": [],
            "steps": {},
        }

    @classmethod
    def resume(cls, source: Path, folder: Path, about: dict[str, str], rehearsal: bool, missing: dict) -> "Report":
        """A report that begins with what `source` holds, and is written to `folder` under the same name.

        Raises:
            ReportError: `source` is no report, or one of another GPU, other versions or sources, or of a rehearsal
                where this run is none; or `folder` has another report of that name.
        """
        try:
            data = json.loads(source.read_text())
        except (OSError, ValueError) as error:
            raise ReportError(f"{source}: cannot be read: {error}") from error
        kinds = {"rehearsal": bool, "about": dict, "runs": list, "steps": dict}
        if (
            not isinstance(data, dict)
            or data.get("format") != FORMAT
            or not all(isinstance(data.get(key), kind) for key, kind in kinds.items())
        ):
            raise ReportError(f"{source}: expected the .json of a report of format {FORMAT}")
        if data["rehearsal"] != rehearsal:
            kinds = "a rehearsal, none of whose figures counts", "a run on a GPU"
            was, now = kinds if data["rehearsal"] else kinds[::-1]
            raise ReportError(f"{source}: it is the report of {was}; this is {now}")
        for key in IDENTITY:
            if data["about"].get(key) != about[key]:
                was = data["about"].get(key)
                hint = f" (commits {data['about'].get('commit')} and {about['commit']})" if key == "sources" else ""
                raise ReportError(f"{source}: its {key} was {was}, here it is {about[key]}{hint}")
        target = folder / source.name
        if target.exists() and not target.samefile(source):
            raise ReportError(f"{target}: there is another report of this name; --out names another folder")
        report = cls(folder / source.stem, about, rehearsal, missing)
        report.data |= {"runs": data["runs"], "steps": data["steps"]}
        return report

    def items(self, step: str) -> dict[str, dict]:
        return self.data["steps"].setdefault(step, {"items": {}})["items"]

    def is_done(self, step: str, item: Item) -> bool:
        return self.items(step).get(item.name, {}).get("status") in DONE

    def start_run(self, command: str, minutes: float | None) -> None:
        with self.lock:
            started = datetime.datetime.now().isoformat(timespec="seconds")
            self.data["runs"].append({"started": started, "command": command, "minutes": minutes})
            self.write()

    def describe(self, step: str, description: str, skipped: str | None = None) -> None:
        """Begins a step, or says why all of it is left out."""
        with self.lock:
            self.items(step)
            self.data["steps"][step] |= {"description": description, "skipped": skipped}
            clock = datetime.datetime.now().strftime("%H:%M:%S")
            print(f"\n== {clock} {step}: {f'left out: {skipped}' if skipped else description}", flush=True)
            self.write()

    def begin(self, step: str, item: Item) -> None:
        with self.lock:
            # One that never ends stands here as cut.
            self.items(step)[item.name] = {"status": CUT, "reason": "the run ended", "seconds": None, "findings": []}
            self.write()

    def find(self, step: str, item: Item, finding: dict) -> None:
        with self.lock:
            self.items(step)[item.name]["findings"].append(finding)
            self.write()
            figures = ((key, text_of(value)) for key, value in finding.items())
            print(f"{step}: " + ", ".join(f"{key} {text}" for key, text in figures if text), flush=True)

    def end(self, step: str, item: Item, status: str, seconds: float, reason: str = "", output: str = "") -> None:
        with self.lock:
            entry = self.items(step)[item.name]
            if status == OK and any(finding.get("ok") is False for finding in entry["findings"]):
                status = FAILED
            entry |= {"status": status, "reason": reason, "seconds": round(seconds, 2)}
            if status != OK:
                entry["output"] = output
            self.write()
            if status != OK:
                print(f"{step}: {item.name}: {status.upper()} {reason}\n{output}".rstrip(), flush=True)

    def leave_out(self, step: str, items: list[Item], reason: str) -> None:
        with self.lock:
            for item in items:
                entry = {"status": LEFT_OUT, "reason": reason, "seconds": None, "findings": []}
                if self.items(step).setdefault(item.name, entry)["status"] != CUT:  # whose findings stay
                    self.items(step)[item.name] = entry
            print(f"{step}: left out {reason}: {'; '.join(item.name for item in items)}", flush=True)
            self.write()

    def bad(self) -> list[str]:
        """Names of the items that failed, crashed or hung."""
        return [
            f"{step}: {name}"
            for step, entry in self.data["steps"].items()
            for name, item in entry["items"].items()
            if item["status"] in BAD
        ]

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", json.dumps(self.data)), (".md", self.markdown())):
            with atomic_write(Path(f"{self.path}{suffix}")) as part:
                part.write_text(text + "\n", encoding="utf-8")

    def markdown(self) -> str:
        data = self.data
        title = "Rehearsal without a GPU: no figure counts" if data["rehearsal"] else data["about"]["GPU"]
        parts = [f"# {title}", ", ".join(f"{key} {value}" for key, value in data["about"].items())]
        for run in data["runs"]:
            minutes = f", at most {run['minutes']:g} minutes" if run["minutes"] else ""
            parts.append(f"{run['started']}{minutes}: `{run['command']}`")
        if data["missing"]:
            parts.append("Missing here:")
            parts.append("\n".join(f"- {name}: {effect}" for name, effect in data["missing"].items()))
        for step, entry in data["steps"].items():
            parts += self.section(step, entry)
        return "\n\n".join(parts)

    def section(self, step: str, entry: dict) -> list[str]:
        items = entry["items"]
        statuses = [item["status"] for item in items.values()]
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in (OK, *BAD, CUT, LEFT_OUT) if s in statuses)
        parts = [f"## {step}{f': {counts}' if counts else ''}", entry.get("description", "")]
        if entry.get("skipped"):
            parts.append(f"Left out: {entry['skipped']}.")
        for name, item in items.items():
            if item["status"] in (*BAD, CUT):
                parts.append(f"**{name}: {item['status']}** {item['reason']}".rstrip())
                if item.get("output"):
                    parts.append(f"```text\n{item['output']}\n```")
        reasons: dict[str, list[str]] = {}
        for name, item in items.items():
            if item["status"] == LEFT_OUT:
                reasons.setdefault(item["reason"], []).append(name)
        parts += [f"Left out {reason}: {'; '.join(names)}." for reason, names in reasons.items()]
        if rows := [finding for item in items.values() for finding in item["findings"]]:
            parts.append(tables(rows))
        return parts
