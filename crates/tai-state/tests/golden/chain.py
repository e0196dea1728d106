#!/usr/bin/env python3
"""Writes chain.jsonl: golden vectors of the hash chain, computed without the library.

Canonical JSON here: sorted keys (by code point, which is the order of UTF-8 bytes), no white space,
no escapes but those that JSON demands, integers in decimal. Doubles are limited to ones that Python
and Rust write alike.
"""
import hashlib
import json
import pathlib

metadata = {"changed_by": "ada", "context": {}, "parent_version": None, "reason": ""}
vectors = [
    {"data": {"count": 0}},
    {"data": None, "deleted": True, "action": "delete"},
    {"data": [[], {}, "", {"": [None, True, False]}], "state_id": "a/b~c%", "governor_id": "__x__"},
    {"data": {"\u00e9": 1, "z": 2, "\U00010000": 3, "\uffff": 4, "A": "\"\\\b\t\n\f\r\u0001\u007f/"}},
    {"data": [18446744073709551615, -9223372036854775808, 0.1, 0.30000000000000004, -0.0, 1.0, 1.5e300],
     "causality": {"b": 2, "a": 9223372036854775807}, "timestamp": "2026-01-02T03:04:05.000006Z"},
    {"data": "x" * 1000, "version": 9223372036854775807,
     "metadata": {"changed_by": "\u202e", "context": {"k": {"b": 1, "a": [2]}}, "parent_version": 7, "reason": "why"}},
]
lines = []
previous = None
for number, special in enumerate(vectors, 1):
    hashed = {
        "action": "save", "causality": {"node": number}, "data": None, "deleted": False, "format": 1,
        "governor_id": "gov", "id": f"id-{number}", "metadata": metadata, "prev_hash": previous,
        "state_id": "state", "timestamp": "2026-01-02T03:04:05Z", "version": number,
    } | special
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    text = text.replace("1.5e+300", "1.5e300")
    previous = hashlib.sha256(text.encode()).hexdigest()
    lines.append('{"hash":"%s","hashed":%s}\n' % (previous, text))
pathlib.Path(__file__).with_name("chain.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
