import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.py")), ids=lambda path: path.stem)
def test_collection_needs_no_framework(path):
    """A module that imports one before it can skip ends the collection of all tests where it is not installed."""
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "ABSENT":
            break  # the module skips itself
        names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        names += [statement.module] if isinstance(statement, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & {"torch", "keras", "parity"}, ast.unparse(statement)
