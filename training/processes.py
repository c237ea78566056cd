"""What one process does for all of them."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


Result = TypeVar("Result")


def in_main_process(what: str, function: Callable[[], Result]) -> Result:
    """
    Call a function in the main process alone, while the others wait, and give its result to all.

    Args:
        what (`str`): What it does, for the message.
        function (`Callable`): Without arguments; its result is pickled where there are several processes.

    Raises:
        Exception: In the main process whatever the function raises.
        RuntimeError: In the others, with the same cause.
    """
    result, failure, told = None, None, None
    if PartialState().is_main_process:
        try:
            result = function()
        except Exception as error:
            failure, told = error, f"{type(error).__name__}: {error}"
    result, told = broadcast_object_list([result, told])
    if failure is not None:
        raise failure
    if told is not None:
        raise RuntimeError(f"{what} failed in the main process: {told}")
    return result
