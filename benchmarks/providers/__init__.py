"""All providers. Importing this package registers every provider, in the order in which tables name them."""

from . import ours, pytorch, plain, floors, peers, prefix, trainers  # noqa: F401, I001
