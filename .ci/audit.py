"""Looks up known vulnerabilities of pinned packages, and says so when they could not be looked up.

python .ci/audit.py constraints.txt

Exit codes: 0 nothing is known; 1 vulnerabilities are; 3 they could not be looked up for all packages.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_NOT_KNOWN = 3


def main(requirements: str) -> int:
    command = [sys.executable, "-m", "pip_audit", "-r", requirements, "--no-deps", "--disable-pip", "-f", "json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(ended.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"audit: the feed of vulnerabilities cannot be reached from here: {last}")
        return _NOT_KNOWN
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, one) for package in packages for one in package.get("vulns", ())]
    for package, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no version yet"
        print(f"audit: {package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    print(f"audit: {len(packages) - len(skipped)} of {len(packages)} packages looked up, {len(found)} vulnerabilities")
    if len(skipped) == len(packages):
        print("audit: the feed of vulnerabilities cannot be reached from here, so this says nothing")
    elif skipped:
        print(f"audit: not looked up, which says nothing about them: {', '.join(skipped)}")
    return 1 if found else _NOT_KNOWN if skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
