"""What a program gets from `import kontext`."""

import subprocess
import sys

import pytest

import kontext


def test_import_alone_is_light():
    code = "import sys, kontext; print('torch' in sys.modules, hasattr(kontext, 'Kontext'), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["False", "True", "True"]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'Context'"):
        _ = kontext.Context
