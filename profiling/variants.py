"""`Variant`: a Triton kernel with its launcher's types and constants, listed in profiling/aot/ for inspect_kernels.py."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass
class Variant:
    """One kernel with the types of its arguments and its constants.

    Args:
        name: distinguishes it among the operation's variants.
        kernel: the `triton.jit` function.
        types: argument types other than the defaults, "*fp32" for `..._ptr` and "i32" for others.
        constants: constexpr arguments, and None for an absent pointer; names that the kernel lacks are ignored.
        tile: the launcher's tile: sizes (BLOCK...), which are constants, and num_warps, num_stages.
        product: whether the kernel has a matrix product and so must use tensor-core instructions.
        divisible: further arguments that are multiples of 16: those with one of these words in their name.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    tile: dict[str, int]
    product: bool = False
    divisible: tuple[str, ...] = ()

    def __post_init__(self):
        names = self.kernel.arg_names
        blocks = {key: value for key, value in self.tile.items() if key.startswith("BLOCK")}
        self.options = {key: value for key, value in self.tile.items() if key not in blocks}
        self.constants = {key: value for key, value in (blocks | self.constants).items() if key in names}
        if missing := [p.name for p in self.kernel.params if p.is_constexpr and p.name not in self.constants]:
            raise ValueError(f"{self.name}: the variant says nothing about {missing}")
        usual = {key: "*fp32" if key.endswith("_ptr") else "i32" for key in names} | self.types
        self.signature = {key: "constexpr" if key in self.constants else usual[key] for key in names}

    @property
    def specialised(self) -> list[str]:
        """Arguments that Triton makes constants where they are 1: integers, unless the kernel says otherwise."""
        apart = {p.name for p in self.kernel.params if p.do_not_specialize}
        return [name for name, kind in self.signature.items() if kind.startswith("i") and name not in apart]

    def with_ones(self, *names: str) -> "Variant":
        """The variant with 1 for these arguments, as a constant."""
        return replace(self, name=f"{self.name}, {' = '.join(names)} = 1", constants=self.constants | dict.fromkeys(names, 1))

    @property
    def aligned(self) -> list[str]:
        """Arguments that are multiples of 16, as the launcher would detect: pointers and `divisible` ones."""
        given = [key for key, kind in self.signature.items() if kind != "constexpr"]
        return [key for key in given if self.signature[key][0] == "*" or any(word in key for word in self.divisible)]
