"""launchers/style.py counts marker words in prose, and nothing in code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PAGE = """# Resume a run
The command given again goes on, to the bit, as it stands.
Run `found = whole(hidden)` or see [the page](whole.md).

```python
whole = found
```
"""
MODULE = '''"""What the run found."""
whole = "hidden"  # lies beside the other


def main(hidden: str = option("refused", help="Where there is none, nothing is told.")) -> None:
    """Return the loss."""
'''


def test_it_counts_prose_of_pages_and_modules(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "module.py").write_text(MODULE)
    command = [sys.executable, str(ROOT / "launchers" / "style.py"), str(tmp_path), "--lines", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *rows, pages, package, worst = done.stdout.splitlines()
    assert [int(row.split()[4]) for row in (pages, package)] == [3, 6]
    assert len(rows) == 2
    assert "page.md:2: The command" in worst
