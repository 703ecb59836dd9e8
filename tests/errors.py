"""How a mistake is told: in one line that names it."""

import pytest


def one_line_error(call, *words, error=ValueError):
    """The call must raise an error of one line that holds all the words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
