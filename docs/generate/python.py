"""Makes reference/python.md and a page per package: the Python API, from its docstrings."""

from __future__ import annotations

from pathlib import Path

import autosparse

PACKAGE = Path(autosparse.__file__).parent
TOP = """# In Python

`import autosparse` gives these names; each is imported when it is first used. The packages behind
them: {packages}.

"""


def packages() -> dict[str, list[str]]:
    """Return package -> its public modules."""
    return {
        path.parent.name: sorted(
            module.stem for module in path.parent.glob("*.py") if not module.stem.startswith("_")
        )
        for path in sorted(PACKAGE.glob("*/__init__.py"))
    }


def front_page() -> str:
    """Return the page of the names that `import autosparse` gives."""
    links = ", ".join(f"[{name}](python/{name}.md)" for name in packages())
    rows = ["| name | what it is |", "|---|---|"]
    for name, home in sorted(autosparse._HOMES.items()):
        said = (getattr(autosparse, name).__doc__ or "").strip().splitlines()[0]
        rows.append(f"| [`autosparse.{name}`][autosparse.{home}.{name}] | {said} |")
    return TOP.format(packages=links) + "\n".join(rows) + "\n"


def package_page(name: str, modules: list[str]) -> str:
    """Return the page of one package: its modules with all that is public in them."""
    parts = [f"# autosparse.{name}\n"]
    for module in modules:
        parts.append(
            f"::: autosparse.{name}.{module}\n    options:\n      heading_level: 2\n"
            "      show_root_toc_entry: true\n      show_bases: false\n"
        )
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """Return every page by its path."""
    return {"reference/python.md": front_page()} | {
        f"reference/python/{name}.md": package_page(name, modules)
        for name, modules in packages().items()
    }
