"""Who may do what in the composition's Redis: `python deploy/redis/users.py` writes users.acl.template.

deploy/secrets.sh puts hashes of passwords where the names of users stand in angle brackets, without any Python. The
users may touch what belongs to deployments of any name, since this Redis has no others than those of its composition.
"""

from __future__ import annotations

from pathlib import Path

from streamflow.transport.acl import DEFAULT_OFF, RIGHTS, administrator_line, user_line

OUT = Path(__file__).parent / "users.acl.template"


def text() -> str:
    users = [user_line(role, rights, ["*"], f"<{role}>") for role, rights in RIGHTS.items()]
    return "\n".join([DEFAULT_OFF, *users, administrator_line("administrator", "<administrator>")]) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), "utf-8")
