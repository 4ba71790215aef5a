"""What a rank has to do without, or has otherwise than a notebook: a keyboard, a screen, an importable __main__.

`prepare` is called once in each rank, `adopt` with each call; what is refused says what to do instead.
"""

import builtins
import multiprocessing.spawn
import pickle
import sys
import types
from multiprocessing.reduction import ForkingPickler

import cloudpickle

NO_KEYBOARD = "a rank has no keyboard: print what you want to see, or return it and look at it in the notebook"


def prepare():
    import torch.distributed as dist

    builtins.input = sys.breakpointhook = dist.breakpoint = _no_keyboard
    ForkingPickler.reducer_override = _by_value
    dist.distributed_c10d._pickler = _Pickler  # of broadcast_object_list, all_gather_object, …


def _no_keyboard(*_, **__):
    raise RuntimeError(NO_KEYBOARD)


# ---- the reader's classes and functions -----------------------------------------------------------------------
# What a cell defines comes here by value, and no module has it. But pickle writes a class or a function as a name, and
# looks for it in __main__. So that is where classes have to be found (`torch.save` of a model), and where several
# processes exchange them (collectives of objects, a DataLoader's workers, a Pool) the value travels beside the name.


def _by_value(pickler, obj):
    """A pickler's reducer_override: functions and classes of cells as cloudpickle writes them, beside their names."""
    if isinstance(obj, (type, types.FunctionType)) and getattr(obj, "__module__", None) == "__main__":
        return _found, (obj.__qualname__, cloudpickle.dumps(obj))
    return NotImplemented


class _Pickler(pickle.Pickler):
    reducer_override = _by_value


def _found(name, value):
    """The receiver's own class of that name, so that isinstance goes on to hold; else the one that was sent."""
    ForkingPickler.reducer_override = _by_value  # a worker that was spawned sends its results so, too
    own = getattr(sys.modules["__main__"], name, None)
    return own if isinstance(own, type) else pickle.loads(value)


_adopted = {}  # name: the class that `adopt` has put there, and may replace


def adopt(main):
    """Let `main` have the classes that have arrived by value, where the reader's own cells have set no such name."""
    for cls in list(cloudpickle.cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.values()):
        name = cls.__qualname__
        if cls.__module__ == "__main__" and name.isidentifier() and getattr(main, name, None) is _adopted.get(name):
            setattr(main, name, cls)
            _adopted[name] = cls


def let_spawned_workers_find_main():
    """In a whole program that was forked: __mp_main__ is what workers call __main__, and multiprocessing has noted
    another one, from before the program ran."""
    plain = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name):
        sys.modules["__mp_main__"] = sys.modules["__main__"]
        return plain(name)

    multiprocessing.spawn.get_preparation_data = get_preparation_data
