"""SHA-256 of two byte streams at once, on x86 processors with SHA instructions; compiled by numba.

One stream leaves such a processor waiting: each round needs the one before it. Two streams, block by block in turn, take
a fifth longer than the longer one alone. hashlib cannot do that; it saves 5 % of what a conversion costs on one core.
"""

import platform
from functools import cache
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

BLOCK_BYTES = 64


def _primes(count: int) -> list[int]:
    return [n for n in range(2, 400) if all(n % d for d in range(2, n))][:count]


def _root_bits(number: int, power: int) -> int:
    """The first 32 bits after the point of a root of a prime: where the standard's constants come from."""
    scaled, low, high = number << (32 * power), 0, 1 << 40
    while low < high:  # the largest root with root ** power <= scaled
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**power <= scaled else (low, middle - 1)
    return low & 0xFFFFFFFF


INITIAL = tuple(_root_bits(prime, 2) for prime in _primes(8))
_ROUND_CONSTANTS = tuple(_root_bits(prime, 3) for prime in _primes(64))

_BYTE = ir.IntType(8)
_WORD = ir.IntType(32)
_WORDS = ir.VectorType(_WORD, 4)
_BYTES = ir.VectorType(_BYTE, 16)


@cache
def is_available() -> bool:
    """Whether this processor has the instructions."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return bool(llvmlite.binding.get_host_cpu_features().get("sha", False))
    except RuntimeError:  # LLVM cannot tell on this platform
        return False


def _words(numbers: Any) -> ir.Constant:
    return ir.Constant(_WORDS, [ir.Constant(_WORD, number) for number in numbers])


def _shuffled(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_WORD, len(lanes)), [ir.Constant(_WORD, lane) for lane in lanes])
    return builder.shuffle_vector(first, second, mask)


def _loaded(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    place = builder.gep(address, [ir.Constant(ir.IntType(64), offset)])
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


class _Instructions:
    """The three of the processor."""

    def __init__(self, builder: Any) -> None:
        def declared(name: str, operands: int) -> Any:
            kind = ir.FunctionType(_WORDS, [_WORDS] * operands)
            function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            return lambda *values: builder.call(function, values)

        self.two_rounds = declared("llvm.x86.sha256rnds2", 3)
        self.schedule_1 = declared("llvm.x86.sha256msg1", 2)
        self.schedule_2 = declared("llvm.x86.sha256msg2", 2)


def _compress(builder: Any, states: list[tuple[Any, Any]], addresses: list[Any]) -> list[tuple[Any, Any]]:
    """One block of each stream; states are (a b e f, c d g h), first lane last."""
    do = _Instructions(builder)
    swap = [4 * word + byte for word in range(4) for byte in (3, 2, 1, 0)]
    schedules: list[list[Any]] = [[] for _ in addresses]
    now = list(states)
    for group in range(16):
        constants = _words(_ROUND_CONSTANTS[4 * group : 4 * group + 4])
        for stream, address in enumerate(addresses):
            w = schedules[stream]
            if group < 4:
                raw = _loaded(builder, address, 16 * group, _BYTES)
                w.append(builder.bitcast(_shuffled(builder, raw, raw, swap), _WORDS))
            else:
                between = _shuffled(builder, w[-2], w[-1], [1, 2, 3, 4])
                w.append(do.schedule_2(builder.add(do.schedule_1(w[-4], w[-3]), between), w[-1]))
            message = builder.add(w[group], constants)
            abef, cdgh = now[stream]
            cdgh = do.two_rounds(cdgh, abef, message)
            abef = do.two_rounds(abef, cdgh, _shuffled(builder, message, message, [2, 3, 2, 3]))
            now[stream] = (abef, cdgh)
    return [
        (builder.add(abef, old_abef), builder.add(cdgh, old_cdgh))
        for (abef, cdgh), (old_abef, old_cdgh) in zip(now, states, strict=True)
    ]


def _emit(builder: Any, streams: list[tuple[Any, Any]], blocks: Any) -> None:
    """A loop over blocks; a stream is (address of 8 words of state, address of its first block)."""
    long = ir.IntType(64)
    entry = builder.block
    loaded = []
    for state, _ in streams:
        abcd, efgh = (_loaded(builder, builder.bitcast(state, _BYTE.as_pointer()), at, _WORDS) for at in (0, 16))
        loaded.append((_shuffled(builder, efgh, abcd, [1, 0, 5, 4]), _shuffled(builder, efgh, abcd, [3, 2, 7, 6])))
    head, body, done = (builder.append_basic_block(name) for name in ("sha.head", "sha.body", "sha.done"))
    builder.branch(head)
    builder.position_at_end(head)
    number = builder.phi(long)
    number.add_incoming(ir.Constant(long, 0), entry)
    phis = []
    for pair in loaded:
        both = (builder.phi(_WORDS), builder.phi(_WORDS))
        for phi, value in zip(both, pair, strict=True):
            phi.add_incoming(value, entry)
        phis.append(both)
    builder.cbranch(builder.icmp_signed("<", number, blocks), body, done)
    builder.position_at_end(body)
    offset = builder.mul(number, ir.Constant(long, BLOCK_BYTES))
    after = _compress(builder, phis, [builder.gep(data, [offset]) for _, data in streams])
    number.add_incoming(builder.add(number, ir.Constant(long, 1)), builder.block)
    for both, pair in zip(phis, after, strict=True):
        for phi, value in zip(both, pair, strict=True):
            phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    for (state, _), (abef, cdgh) in zip(streams, phis, strict=True):
        words = builder.bitcast(state, _WORDS.as_pointer())
        builder.store(_shuffled(builder, abef, cdgh, [3, 2, 7, 6]), words, align=1)
        upper = builder.gep(words, [ir.Constant(long, 1)])
        builder.store(_shuffled(builder, abef, cdgh, [1, 0, 5, 4]), upper, align=1)


def _address(builder: Any, context: Any, kind: Any, array: Any, start: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(builder.bitcast(data, _BYTE.as_pointer()), [start])


@intrinsic
def _one(typing: Any, state: Any, data: Any, start: Any, blocks: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        own = _address(builder, context, signature.args[0], values[0], zero)
        _emit(builder, [(own, _address(builder, context, signature.args[1], values[1], values[2]))], values[3])
        return context.get_dummy_value()

    return types.none(state, data, types.int64, types.int64), code


@intrinsic
def _two(typing: Any, state: Any, data: Any, start: Any, other: Any, others: Any, begin: Any, blocks: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        zero = ir.Constant(ir.IntType(64), 0)
        kinds = signature.args
        streams = [
            (
                _address(builder, context, kinds[at], values[at], zero),
                _address(builder, context, kinds[at + 1], values[at + 1], values[at + 2]),
            )
            for at in (0, 3)
        ]
        _emit(builder, streams, values[6])
        return context.get_dummy_value()

    return types.none(state, data, types.int64, other, others, types.int64, types.int64), code


_jit = numba.njit(nogil=True, cache=True)


@_jit
def hash_blocks(state: Any, data: Any, start: int, blocks: int) -> None:
    """Move a state, (8,) uint32, on by so many whole blocks of data, (n,) uint8."""
    assert state.size == 8
    assert start >= 0
    assert start + 64 * blocks <= data.size
    _one(state, data, start, blocks)


@_jit
def hash_blocks_of_two(state: Any, data: Any, start: int, other: Any, others: Any, begin: int, blocks: int) -> None:
    """The same for two streams with as many blocks each."""
    assert state.size == 8
    assert other.size == 8
    assert start >= 0
    assert begin >= 0
    assert start + 64 * blocks <= data.size
    assert begin + 64 * blocks <= others.size
    _two(state, data, start, other, others, begin, blocks)
