"""Google's own Python client reads what `tai-state` wrote on the emulator, as docs/data-model.md and
docs/firestore.md describe it; and `tai-state` notices what was changed behind its back.

    FIRESTORE_EMULATOR_HOST=HOST:PORT python read_ours.py TAI_STATE PROJECT PREFIX

TAI_STATE is the program, PROJECT one that nothing was written to.
"""

import datetime
import json
import math
import os
import re
import subprocess
import sys

from google.cloud import firestore

TOOL, PROJECT, PREFIX = sys.argv[1:]
BASE = f"firestore+emulator://{os.environ['FIRESTORE_EMULATOR_HOST']}/{PROJECT}"
URL = f"{BASE}?prefix={PREFIX}" if PREFIX else BASE
DB = firestore.Client(project=PROJECT)


def run(*args, feed="", url=URL):
    """The exit code and the standard output of the program; if it fails, its error too."""
    command = [TOOL, "-u", url, "-o", "jsonl", *args]
    ran = subprocess.run(command, input=feed, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + (ran.stderr if ran.returncode else "")


def tool(*args, **more):
    """What the program answers, one value a line."""
    code, text = run(*args, **more)
    assert code == 0, (args, code, text)
    return [json.loads(line) for line in text.splitlines()]


def escaped(name):
    """The documented form of an id in a path."""

    def hidden(text):
        return "".join(f"%{byte:02X}" for byte in text.encode())

    if name in (".", ".."):
        return hidden(name)
    reserved = len(name) >= 4 and name.startswith("__") and name.endswith("__")
    start, rest = ("%5F", name[1:]) if reserved else ("", name)
    return start + re.sub(r"[%/~\x00-\x1f\x7f-\x9f]", lambda found: hidden(found[0]), rest)


def document(governor, kind, name):
    return DB.document(f"{PREFIX}governors/{escaped(governor)}/{PREFIX}{kind}/{name}")


def read(governor, kind, name):
    found = document(governor, kind, name).get()
    assert found.exists, found.reference.path
    return found.to_dict()


def unwrapped(value):
    """The documented rule: a map whose one field is `tai:json` is the JSON in it."""
    if isinstance(value, dict):
        if list(value) == ["tai:json"]:
            return json.loads(value["tai:json"])
        return {key: unwrapped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unwrapped(item) for item in value]
    return value


def same(found, wanted, where=""):
    """Equal, and of the same type all the way down: 1, 1.0 and True are three values."""
    assert type(found) is type(wanted), (where, found, wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), (where, found, wanted)
        for key, item in wanted.items():
            same(found[key], item, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), (where, found, wanted)
        for index, item in enumerate(wanted):
            same(found[index], item, f"{where}[{index}]")
    else:
        assert found == wanted, (where, found, wanted)
        if isinstance(wanted, float):
            assert math.copysign(1, found) == math.copysign(1, wanted), (where, found, wanted)


def time(text):
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


def proves_as_one_change(found, shown):
    """What heads, events and saved snapshots have in common, beside what the program shows of it."""
    assert isinstance(found["timestamp"], datetime.datetime), found["timestamp"]
    assert found["timestamp"] == time(shown["timestamp"]), (found["timestamp"], shown)
    same(found["version"], shown["version"])
    same(found["metadata"], shown["metadata"])
    assert found["metadata"]["changed_by"] and "reason" in found["metadata"], found["metadata"]
    same(found["causality"], shown["causality"])
    (node, count), = found["causality"].items()
    same(count, shown["version"])
    assert re.fullmatch("hub-[0-9a-f]{12}", node), node
    same(found["deleted"], shown.get("deleted", False))
    same(found["format"], 1)
    same(found["hash"], shown["hash"])
    assert re.fullmatch("[0-9a-f]{64}", found["hash"]), found["hash"]


def a_state_is_what_the_program_shows(governor, state):
    """Head and log of one state; returns the head's own `state` field."""
    events = tool("history", f"{governor}/{state}")
    head = read(governor, "states", escaped(state))
    before = {"version": 0, "to_state": None, "hash": None, "exists": False}
    for version, shown in enumerate(events, 1):
        event = read(governor, "events", f"{escaped(state)}~{version:020}")
        proves_as_one_change(event, shown)
        for field in ("id", "state_id", "action"):
            same(event[field], shown[field], field)
        same(event["from_version"], before["version"])
        same(event["prev_hash"], before["hash"])
        # Left out where there was nothing, and where it would be much.
        large = len(json.dumps(before["to_state"])) > 100_000
        assert ("from_state" in event) != (large or not before["exists"]), (governor, state, version)
        if "from_state" in event:
            same(unwrapped(event["from_state"]), shown["from_state"], "from_state")
        same(unwrapped(event["to_state"]), shown["to_state"], "to_state")
        same(shown["from_state"], before["to_state"], "before")
        before = {**shown, "exists": not shown.get("deleted", False)}
    same(head["event_id"], before["id"])
    same(head["action"], before["action"])
    same(head["first_version"], 1)
    proves_as_one_change(head, before)
    same(unwrapped(head["state"]), before["to_state"], "head")
    if not head["deleted"]:
        [shown] = tool("get", f"{governor}/{state}")
        proves_as_one_change(head, shown)
        same(unwrapped(head["state"]), shown["data"], "get")
    return head["state"]


NATIVE = {
    "null": None,
    "yes": True,
    "no": False,
    "count": 3,
    "zero": 0,
    "least": -(2**63),
    "most": 2**63 - 1,
    "double": 0.1,
    "whole": 1.0,
    "minus nothing": -0.0,
    "small": 5e-324,
    "large": 1.7976931348623157e308,
    "text": 'é \u202e "quoted" \U0001f980\n',
    "nothing": "",
    # A time of the caller's is the caller's text.
    "timestamp": "2026-01-01T00:00:00Z",
    "list": [1, 1.0, "a", None, True, {"in": [1, {"deeper": []}]}],
    "empty list": [],
    "empty map": {},
    "map": {"status": "open", "dots.in.key": 1, "`": 2, "é": {"x": {"y": {"z": [None]}}}},
}
DEEP = 1
for _ in range(40):
    DEEP = {"d": DEEP}
# Each with what stands for it in the document.
WRAPPED = {
    "matrix": ([[1, 2], [3, [4]]], [{"tai:json": "[1,2]"}, {"tai:json": "[3,[4]]"}]),
    "beyond i64": (2**64 - 1, {"tai:json": "18446744073709551615"}),
    "empty key": ({"": 1}, {"tai:json": '{"":1}'}),
    "reserved key": ({"__x__": 1}, {"tai:json": '{"__x__":1}'}),
    "looks wrapped": ({"tai:json": "1"}, {"tai:json": '{"tai:json":"1"}'}),
}
IDS = ["x~y", "50%", "a/b", "..", "__x__", "\u202ertl é", "new\nline", "%2F", "~", " "]


def put(address, data):
    tool("put", address, "--reason", "why not", feed=json.dumps(data))


def written():
    [made] = tool("init")
    put("values/native", NATIVE)
    put("values/native", {**NATIVE, "count": 4})
    put("values/wrapped", {key: value for key, (value, _) in WRAPPED.items()})
    put("values/deep", DEEP)
    for name, data in {"text": "é", "none": None, "number": 1.5, "list": [1, [2]]}.items():
        put(f"values/{name}", data)
    put("values/large", "x" * 150_000)
    put("values/large", "y" * 150_000)
    put("values/gone", {"a": 1})
    tool("rm", "values/gone")
    put("values/back", None)
    tool("rm", "values/back")
    put("values/back", 1)
    put("values/back", 2)
    for name in IDS:
        # The first slash divides an address, so a governor has none.
        put(f"{name.replace('/', '~')}/{name}", {"id": name})
    line = {"governor_id": "machines", "state_id": "m", "action": "step", "actor": "ada"}
    start = datetime.datetime(2026, 1, 1, 0, 0, 0, 123456, datetime.timezone.utc)
    lines = [
        {
            **line,
            "timestamp": (start + datetime.timedelta(minutes=n)).isoformat(),
            "data": {"count": n, "laps": {"done": n // 10}},
        }
        for n in range(1, 121)
    ]
    tool("import", "-", feed="\n".join(json.dumps(line) for line in lines))
    return made, lines


def check_what_was_written(made, lines):
    meta = DB.document(f"{PREFIX}tai_state_meta/store").get().to_dict()
    same(meta["store"], made["store"])
    same(meta["format"], 1)
    same(meta["incarnation"], 1)

    native = a_state_is_what_the_program_shows("values", "native")
    same(native, {**NATIVE, "count": 4}, "native")
    wrapped = a_state_is_what_the_program_shows("values", "wrapped")
    same(wrapped, {key: stored for key, (_, stored) in WRAPPED.items()}, "wrapped")
    same(unwrapped(wrapped), {key: value for key, (value, _) in WRAPPED.items()}, "unwrapped")
    same(unwrapped(a_state_is_what_the_program_shows("values", "deep")), DEEP, "deep")
    same(a_state_is_what_the_program_shows("values", "text"), "é")
    same(a_state_is_what_the_program_shows("values", "number"), 1.5)
    same(a_state_is_what_the_program_shows("values", "list"), [1, {"tai:json": "[2]"}])
    same(a_state_is_what_the_program_shows("values", "none"), None)
    same(a_state_is_what_the_program_shows("values", "large"), "y" * 150_000)
    same(a_state_is_what_the_program_shows("values", "back"), 2)
    same(a_state_is_what_the_program_shows("values", "gone"), None)
    assert read("values", "states", "gone")["deleted"] is True
    for name in IDS:
        governor = name.replace("/", "~")
        same(a_state_is_what_the_program_shows(governor, name), {"id": name})

    # The log of a longer life, and its saved snapshot.
    a_state_is_what_the_program_shows("machines", "m")
    for version, line in enumerate(lines, 1):
        event = read("machines", "events", f"m~{version:020}")
        same(event["to_state"], line["data"])
        assert event["timestamp"] == time(line["timestamp"]), event
    [shown] = tool("get", "machines/m", "--at", "v100")
    saved = read("machines", "snapshots", f"m~{100:020}")
    proves_as_one_change(saved, shown)
    same(saved["state"], shown["data"])
    same(saved["state"], lines[99]["data"])
    same(read("machines", "states", "m")["snapshot_versions"], [100])

    # Nothing stands beside it: every document there is was looked at above, and has its place.
    governors = DB.collection(f"{PREFIX}governors")
    names = {reference.id for reference in governors.list_documents()}
    assert names == {"values", "machines", *(escaped(name.replace("/", "~")) for name in IDS)}, names
    [stats] = tool("stats")
    for kind, count in (
        ("states", stats["total_states"] + stats["deleted_states"]),
        ("events", stats["total_events"]),
        ("snapshots", stats["total_snapshots"]),
    ):
        stored = [found.id for found in DB.collection_group(f"{PREFIX}{kind}").stream()]
        assert len(stored) == count, (kind, len(stored), stats)

    # Queries on the caller's own fields, and on times as times.
    def found(collection, *filters):
        query = governors.document("machines").collection(f"{PREFIX}{collection}")
        for path, operator, value in filters:
            query = query.where(filter=firestore.FieldFilter(path, operator, value))
        return sorted(found.id for found in query.stream())

    assert found("states", ("state.count", "==", 120)) == ["m"]
    assert found("states", ("state.laps.done", ">", 11)) == ["m"]
    assert found("states", ("state.count", "==", 119)) == []
    assert found("states", ("timestamp", ">=", time(lines[-1]["timestamp"]))) == ["m"]
    assert found("states", ("timestamp", ">", time(lines[-1]["timestamp"]))) == []
    assert found("events", ("to_state.count", "<=", 2)) == [f"m~{n:020}" for n in (1, 2)]
    log = governors.document("machines").collection(f"{PREFIX}events")
    first, last = (log.document(f"m~{version:020}") for version in (7, 9))
    events = log.order_by("__name__").start_at({"__name__": first}).end_at({"__name__": last})
    assert [event.get("to_state")["count"] for event in events.stream()] == [7, 8, 9]


def check_that_changes_are_noticed(lines):
    [report] = tool("verify")
    head = document("machines", "states", "m")
    event = document("machines", "events", f"m~{60:020}")
    saved = document("machines", "snapshots", f"m~{100:020}")
    base = "machines/m"

    def noticed(what, reference, change, reads=None):
        """After the change `verify` fails and names the state, and reading does not believe it."""
        before = reference.get().to_dict()
        if change is None:
            reference.delete()
        else:
            reference.update(change)
        code, text = run("verify")
        problems = json.loads(text.splitlines()[0])["problems"]
        assert code == 8, (what, code, text)
        names = (base, reference.path)
        assert any(name in problem for problem in problems for name in names), (what, problems)
        if reads is not None:
            code, text = run("get", base, *reads)
            assert code == 8, (what, code, text)
        reference.set(before)
        assert tool("verify") == [report], what

    a_time = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    for value in (
        7,
        120.0,
        "120",
        None,
        float("nan"),
        float("inf"),
        b"120",
        a_time,
        head,
        firestore.GeoPoint(1, 2),
        firestore.DELETE_FIELD,
        {"tai:json": "121"},
        {"tai:json": "not JSON"},
    ):
        noticed(f"count = {value}", head, {"state.count": value}, reads=())
    noticed("a field more", head, {"state.more": 1}, reads=())
    noticed("version", head, {"version": 119}, reads=())
    noticed("who", head, {"metadata.changed_by": "eve"}, reads=())
    noticed("when", head, {"timestamp": a_time}, reads=())
    noticed("hash", head, {"hash": "0" * 64}, reads=())
    noticed("deleted", head, {"deleted": True}, reads=())
    noticed("event", event, {"to_state.count": 61}, reads=("--at", "v60"))
    noticed("event's action", event, {"action": "other"}, reads=("--at", "v60"))
    noticed("no event", event, None)
    noticed("saved snapshot", saved, {"state.count": 7})
    noticed("no saved snapshot", saved, None)

    # A head that is whole in itself, of a history that went another way.
    fork = [*lines[:-1], {**lines[-1], "data": {"count": -1}}]
    fork = "\n".join(json.dumps(line) for line in fork)
    tool("import", "-", feed=fork, url=f"{BASE}?prefix={PREFIX}fork_")
    governor = DB.document(f"{PREFIX}fork_governors/machines")
    other = governor.collection(f"{PREFIX}fork_states").document("m").get().to_dict()
    assert (other["version"], other["state"]) == (120, {"count": -1}), other
    noticed("another history's head", head, other)

    # The data before a change is repeated for other readers; nobody here believes it.
    history = tool("history", base)
    event.update({"from_state.count": 7})
    same(tool("history", base), history)

    # One event too many.
    extra = document("machines", "events", f"m~{121:020}")
    extra.set(event.get().to_dict())
    code, text = run("verify")
    assert code == 8, (code, text)
    extra.delete()
    assert tool("verify") == [report]


made, lines = written()
check_what_was_written(made, lines)
check_that_changes_are_noticed(lines)
print("ok")
