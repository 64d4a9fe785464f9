"""Is there a secret in the repository?  python -m tests.leaked

Looks through every file that git tracks for what scanners of leaked secrets look for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = {
    "a token of this farm": rb"farm_[0-9a-f]{12}_[\w-]{43}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an access key of Amazon": rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of the model hub": rb"\bhf_[A-Za-z]{34}\b",
    "a token of GitHub": rb"\b(gh[pousr]_\w{36}|github_pat_\w{82})\b",
    "a key of OpenAI": rb"\bsk-(proj-)?[A-Za-z0-9_-]{40,}",
}


def leaks(files: list[Path]) -> list[str]:
    """Each secret as `file:line: what it is`, never the secret itself."""
    found = []
    for path in files:
        data = path.read_bytes()
        for what, pattern in KINDS.items():
            for match in re.finditer(pattern, data):
                line = data.count(b"\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {what}")
    return found


def tracked() -> list[Path]:
    """The files that git tracks."""
    told = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    names = told.stdout.decode().split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


if __name__ == "__main__":
    wrong = leaks(tracked())
    print("\n".join(wrong) or "no secret in the repository")
    sys.exit(bool(wrong))
