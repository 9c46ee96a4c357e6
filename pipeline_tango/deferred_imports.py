"""Imports of libraries that diffusers and transformers make and a command may never use, put off until first use."""

import contextlib
import functools
import importlib
import sys
import threading
from importlib.machinery import PathFinder
from types import ModuleType


DEFERRED = ("peft", "scipy.integrate", "scipy.optimize", "scipy.stats", "torch._dynamo")
# Decorators that diffusers and transformers call: the first two return what they are given.
MARKS = ("torch._dynamo.allow_in_graph", "torch._dynamo.assume_constant_result")
DISABLE = "torch._dynamo.disable"
ASKED_FOR = ("peft.PeftModel", "torch._dynamo.eval_frame.OptimizedModule")  # diffusers asks whether models are these

lock = threading.RLock()


class DeferredModule(ModuleType):
    """Stands for a module until something of it is used, and passes attributes on from then on."""

    def __getattr__(self, name):
        finder = self.__loader__.finder
        if name.startswith("__") and name != "__version__":  # what importlib and inspect look for in every module
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if finder.is_active and not finder.is_imported(self.__name__) and name != "__version__":
            vars(self)[name] = DeferredName(finder, f"{self.__name__}.{name}")  # another `from` gets the same one
            return vars(self)[name]
        return getattr(finder.import_for_good(self.__name__), name)

    def __setattr__(self, name, value):
        if name.startswith("__") or isinstance(value, DeferredModule):  # by importlib
            super().__setattr__(name, value)
        else:
            setattr(self.__loader__.finder.import_for_good(self.__name__), name, value)


class DeferredName:
    """Stands for what `from module import name` takes from a [`DeferredModule`], until it is used."""

    def __init__(self, finder, path):
        vars(self).update(finder=finder, path=path)

    def _import(self):
        module, name = self.path.rsplit(".", 1)
        return getattr(self.finder.import_for_good(module), name)

    def __call__(self, *args, **kwargs):
        if not self.finder.is_imported(self.path):
            if self.path in MARKS:
                self.finder.marked.append((self, args[0]))
                return args[0]
            if self.path == DISABLE:
                return self._disable(*args, **kwargs)
        return self._import()(*args, **kwargs)

    def _disable(self, function=None, *args, **kwargs):
        """`function`, which nothing compiles before the compiler is imported, or a decorator."""
        if function is None:
            return lambda function: self(function, *args, **kwargs)

        @functools.wraps(function)
        def disabled(*inputs, **options):
            if self.finder.is_imported(self.path):
                return self._import()(function, *args, **kwargs)(*inputs, **options)
            return function(*inputs, **options)

        return disabled

    def __getattr__(self, name):
        return getattr(self._import(), name)

    def __setattr__(self, name, value):
        setattr(self._import(), name, value)

    def __instancecheck__(self, instance):  # nothing is an instance of a class that is not there yet
        return self.finder.is_imported(self.path) and isinstance(instance, self._import())

    def __subclasscheck__(self, subclass):
        return self.finder.is_imported(self.path) and issubclass(subclass, self._import())

    def __mro_entries__(self, bases):
        return (self._import(),)

    def __or__(self, other):
        return self._import() | other

    def __ror__(self, other):
        return other | self._import()

    def __bool__(self):
        return bool(self._import())

    def __iter__(self):
        return iter(self._import())

    def __getitem__(self, key):
        return self._import()[key]


class DeferringFinder:
    """A finder for `sys.meta_path`, and the loader of the modules that it finds: those of `names`, with all below."""

    def __init__(self, names):
        self.names = tuple(names)
        self.is_active = True
        self.imported = set()  # of `names`
        self.marked = []  # by `MARKS`: the calls are repeated when their library is imported

    def root(self, path):
        return next((name for name in self.names if f"{path}.".startswith(f"{name}.")), None)

    def is_imported(self, path):
        return self.root(path) in self.imported

    def find_spec(self, name, path=None, target=None):
        if not self.is_active or self.root(name) is None or self.is_imported(name):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = DeferredLoader(self)
        return spec

    def import_for_good(self, name):
        """The real module `name`. The first time all that stands for its library is replaced."""
        root = self.root(name)
        with lock:
            if root not in self.imported:
                self.imported.add(root)
                stand_ins = [
                    each
                    for each, module in sys.modules.items()
                    if isinstance(module, DeferredModule) and self.root(each) == root
                ]
                for each in stand_ins:
                    del sys.modules[each]
                importlib.import_module(root)
                for each in stand_ins:
                    importlib.import_module(each)
                self.replace_names(root)
                for decorator, function in self.marked:
                    if self.root(decorator.path) == root:
                        decorator(function)
        return importlib.import_module(name)

    def replace_names(self, root):
        """Put the real ones into the modules that have imported names by `from`."""
        for module in list(sys.modules.values()):
            if not isinstance(module, ModuleType) or isinstance(module, DeferredModule):
                continue
            for name, value in list(vars(module).items()):
                if type(value) is DeferredName and self.root(value.path) == root:
                    vars(module)[name] = value._import()


class DeferredLoader:
    def __init__(self, finder):
        self.finder = finder

    def create_module(self, spec):
        return DeferredModule(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def deferred_imports(names=DEFERRED):
    """Within this context modules of the libraries `names` are not executed when they are imported, but when something
    of them is used, then or later. Those that are imported already stay as they are."""
    finder = DeferringFinder(name for name in names if name not in sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
        for path in ASKED_FOR:
            module, name = path.rsplit(".", 1)
            if isinstance(sys.modules.get(finder.root(path)), DeferredModule):
                getattr(importlib.import_module(module), name)
    finally:
        finder.is_active = False
        sys.meta_path.remove(finder)
