"""The configured loss, and nothing else."""

from fastlt.methods.method import Base


class Method(Base):
    """One model, trained by the recipe's [loss]."""

    takes_sharded_heads = True
