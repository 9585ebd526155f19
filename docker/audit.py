"""Whether packages that the image is built with have known vulnerabilities, by pip-audit and the database OSV.

Exit status: 1 if there are any, 0 if there are none. It is 0 too where OSV cannot be reached, which is said and is no
fault of the packages, and 2 where pip-audit itself fails. Options are passed on to pip-audit: `--ignore-vuln ID` is for
one that does not concern tminus.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LOCKS = Path(__file__).parent / "locks"
# torch-cpu.txt has the same version of torch as torch-cuda.txt, under a name that no database knows.
AUDITED = ("requirements.txt", "torch-cuda.txt", "sbom.txt")
OUT_OF_REACH = re.compile(r"^(?:.*: )?(requests\.exceptions\.\w+|\S*ServiceError|Could not connect)", re.MULTILINE)


def main(options: list[str]) -> int:
    """Audit, and say what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--vulnerability-service", "osv"]
        command += ["--require-hashes", "--disable-pip", "--format", "json", "--output", str(report)]
        for name in AUDITED:
            command += ["--requirement", str(LOCKS / name)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if report.is_file():
            return tell(json.loads(report.read_text("utf-8"))["dependencies"])
    if reason := OUT_OF_REACH.search(done.stderr):
        print(f"NOT AUDITED: the database of vulnerabilities could not be reached ({reason[1]})")
        return 0
    sys.stderr.write(done.stderr)
    return 2


def tell(packages: list[dict[str, Any]]) -> int:
    """Print each vulnerability, and each package of which nothing is known."""
    status = 0
    for package in packages:
        if "skip_reason" in package:
            print(f"NOT AUDITED: {package['name']}: {package['skip_reason']}")
        for found in package.get("vulns", []):
            names = ", ".join([found["id"], *found["aliases"]])
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {names}; fixed in {fixed}")
            status = 1
    audited = sum("skip_reason" not in package for package in packages)
    print(f"{audited} packages audited, {'vulnerabilities are known' if status else 'no vulnerability is known'}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
