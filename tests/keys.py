"""Files of API keys, for keys that a test knows."""

from __future__ import annotations

from streamflow.rpc.auth import ApiKeys, hash_key


def key_lines(text: str) -> str:
    """Lines `key tenant ...` as they stand in a file: with the key's hash."""
    lines = []
    for line in text.splitlines():
        key, _, rest = line.partition(" ")
        lines.append(f"sha256:{hash_key(key).hex()} {rest}\n")
    return "".join(lines)


def api_keys(text: str) -> ApiKeys:
    return ApiKeys.parse(key_lines(text)) if text else ApiKeys()
