"""The entropy coder by itself: how short and how fast, what is left when no bit may be lost, and when it pays.

    python -m benchmarks.exchange.entropy_coder

Three tables. The coder on Gaussian numbers, beside other coders; lossless coding of the weights of two trained models,
beside zstd on their bytes; and how long a meeting of four hosts takes at several rates of the network, in namespaces of
this machine, which needs root and is left out without it.
"""

from __future__ import annotations

import math
import statistics
import time
import zlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

from benchmarks.netlab import Lab, Unavailable

import torch  # isort: skip  # after netlab, which quietens it
import constriction
import numpy as np
import zstandard
from torch import Tensor, nn

from benchmarks.exchange import entropy_coded
from benchmarks.exchange.entropy_coded import Scheme, coded
from benchmarks.result import write_result
from leantrain.exchange.averaging import Averaging
from leantrain.exchange.channel import Channel
from leantrain.exchange.codecs.entropy import Entropy, decode, encode
from leantrain.exchange.codecs.symbol_coders import Ans, Huffman
from leantrain.histogram import bits_per_symbol, integer_entropy

HOSTS, SIDE, MEETINGS = 4, 1000, 5
RATES = ("unlimited", "1gbit", "100mbit", "10mbit")
RING = "float32, ring all-reduce"
MEETING = [
    Scheme("float32, packets", 1),
    coded("rel, c = 1", 1, mode="rel"),
    coded("abs, s = 1/4", 1, mode="abs", step=1 / 4),
    coded("weights on 32 values", 1, send="weights", bits=5),
]


def main() -> None:
    write_coder()
    write_lossless()
    write_meetings()


def write_coder() -> None:
    """Coders on Gaussian numbers, rounded to steps of several lengths."""
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    rows = []
    for c in (0.25, 0.5, 1, 2, 3, 6):
        integers = Entropy("rel", step=c).quantised(numbers).integers
        least = integer_entropy(integers)
        symbols = (integers - integers.min()).numpy()
        counts = np.bincount(symbols)
        for coder, write, read in (
            ("this codec, whole", partial(encode, numbers, step=c), decode),
            ("its Huffman codes", *chunked(Huffman(counts), symbols)),
            ("its numeral systems", *chunked(Ans(counts), symbols)),
            ("range coder of constriction", *range_coded(symbols, counts)),
            ("zstd 3 on bytes", *zstd_coded(integers.to(torch.int8).numpy().tobytes())),
        ):
            code = write()
            bits = 8 * memoryview(code).nbytes / len(numbers)
            speeds = speed(numbers.nbytes / 1e6, write), speed(numbers.nbytes / 1e6, read, code)
            rows.append([f"{c}", f"{least:.3f}", coder, f"{bits:.3f}", f"{100 * (bits / least - 1):+.1f} %", *speeds])
    write_result(
        "exchange/entropy_coder",
        title="Entropy coders: bits a number against the entropy, and speed on one core",
        columns=["step / RMS", "entropy", "coder", "bits", "over the entropy", "encode, MB/s", "decode, MB/s"],
        rows=rows,
        notes=[
            f"{len(numbers):,} Gaussian numbers in one tensor; MB/s of float32 numbers, best of 5. The whole codec "
            "rounds, counts, picks a coder, codes and checks; of the others only the coding of symbols is timed, in "
            f"chunks of 64 k where they are this codec's. constriction {version('constriction')}, zstandard "
            f"{zstandard.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}.",
        ],
    )  # fmt: skip


Coding = tuple[Callable[[], Any], Callable[[Any], object]]


def chunked(coder: Ans | Huffman, symbols: np.ndarray, size: int = 1 << 16) -> Coding:
    pieces = [symbols[start : start + size] for start in range(0, len(symbols), size)]

    def write() -> bytes:
        codes[:] = [coder.encode(piece) for piece in pieces]
        return b"".join(codes)

    codes: list[bytes] = []
    return write, lambda _: [coder.decode(code, size) for code in codes]


def range_coded(symbols: np.ndarray, counts: np.ndarray) -> Coding:
    model = constriction.stream.model.Categorical(counts.astype(np.float64), perfect=False)

    def write() -> np.ndarray:
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(symbols, model)
        return encoder.get_compressed()

    return write, lambda words: constriction.stream.queue.RangeDecoder(words).decode(model, len(symbols))


def zstd_coded(data: bytes) -> Coding:
    return lambda: zstandard.ZstdCompressor(level=3).compress(data), zstandard.ZstdDecompressor().decompress


def write_lossless() -> None:
    """Trained weights, every bit kept, beside zstd on their bytes."""
    rows = []
    for name, tensors in trained_weights().items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = [tensor.to(dtype) for tensor in tensors]
            packets = [encode(tensor, "lossless") for tensor in given]
            whole = torch.int32 if dtype.itemsize == 4 else torch.int16
            assert all(torch.equal(decode(p).view(whole), t.view(whole)) for p, t in zip(packets, given, strict=True))
            size = sum(tensor.nbytes for tensor in given)
            raw = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in given]
            zstd = [sum(len(zstandard.ZstdCompressor(level=level).compress(each)) for each in raw) for level in (3, 19)]
            largest = max(given, key=torch.numel)
            packet = encode(largest, "lossless")
            rows.append([
                f"{name}, {str(dtype).removeprefix('torch.')}",
                f"{size / 1e6:.2f}",
                f"{size / sum(map(len, packets)):.3f}",
                *(f"{size / each:.3f}" for each in zstd),
                f"{exponent_bits(given):.2f}",
                speed(largest.nbytes / 1e6, encode, largest, "lossless"),
                speed(largest.nbytes / 1e6, decode, packet),
            ])  # fmt: skip
    write_result(
        "exchange/entropy_lossless",
        title="Lossless coding of trained weights: times smaller",
        columns=["weights", "MB", "lossless", "zstd 3", "zstd 19", "entropy of exponents, bits", "encode, MB/s",
                 "decode, MB/s"],
        rows=rows,
        notes=["The models of `benchmarks.exchange.entropy_coded`, trained by one process; other types were rounded "
               "from float32. One packet a tensor; zstd has the bytes of each tensor as they lie in memory. Every bit "
               "is compared. Speed: on the largest tensor, MB of its own type, one core, best of 5."],
    )  # fmt: skip


def exponent_bits(tensors: list[Tensor]) -> float:
    exponents = torch.cat([torch.frexp(tensor.float().flatten()).exponent for tensor in tensors])
    return bits_per_symbol(torch.bincount(exponents - exponents.min()).numpy())


def trained_weights() -> dict[str, list[Tensor]]:
    """Of the two models of `benchmarks.exchange.entropy_coded`, trained by one process."""
    mlp, llama = entropy_coded.mlp(0), entropy_coded.llama(0)
    entropy_coded.train_mlp(mlp, Averaging(5), entropy_coded.fashion_mnist(), 0, 0)
    entropy_coded.train_llama(llama, Averaging(5), entropy_coded.characters(), 0, 0)
    models = {"MLP": mlp, "LLaMA": llama}
    return {name: [param.detach() for param in model.parameters()] for name, model in models.items()}


def write_meetings() -> None:
    """Seconds of a meeting at several rates, for changes of one million weights."""
    found: dict[str, dict[str, Any]] = {}
    try:
        for rate in RATES:
            with Lab(HOSTS, rate) as lab:
                for scheme in [None, *MEETING]:
                    name = RING if scheme is None else scheme.name
                    ranks = lab.workers(meet, scheme)
                    turns = zip(*(each["seconds"] for each in ranks), strict=True)
                    seconds = statistics.median(max(turn) for turn in turns)
                    found.setdefault(name, {"sent": ranks[0]["sent"]})[rate] = seconds
    except Unavailable as why:
        print(f"no table of meetings: {why}")
        return
    rows = []
    for name, one in found.items():
        times = [f"{1e3 * one[rate]:.0f} ({found[RING][rate] / one[rate]:.2f}x)" for rate in RATES]
        rows.append([name, f"{one['sent'] / 1e6:.3f}", *times])
    write_result(
        "exchange/entropy_meeting",
        title=f"A meeting of {HOSTS} hosts: milliseconds by the rate of their links",
        columns=["what is sent", "MB sent by each", *(f"ms at {rate}" for rate in RATES)],
        rows=rows,
        notes=[
            f"{SIDE * SIDE + SIDE:,} weights that changed by Gaussian noise of a tenth of their deviation. Encoding, "
            f"sending, decoding all four and averaging: the slowest host, the median of {MEETINGS}. In brackets: times "
            "faster than a ring all-reduce of float32. Hosts are namespaces of one machine and share its cores; with a "
            "core each the coder would take a smaller part.",
        ],
    )  # fmt: skip


def meet(rank: int, scheme: Scheme | None) -> dict[str, Any]:
    """Seconds of each meeting, and what the last one sent."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    seconds, channel = [], Channel()
    exchange = None if scheme is None else scheme.exchange()
    model = nn.Linear(SIDE, SIDE)
    if exchange is not None:
        exchange.attach(model)
    whole = torch.randn(SIDE * SIDE + SIDE)
    for _ in range(MEETINGS + 1):
        with torch.no_grad():
            for param in model.parameters():
                param += 0.1 * param.std() * torch.randn_like(param)
        channel.all_reduce(torch.zeros(1))
        channel.reset()
        began = time.perf_counter()
        if exchange is None:
            channel.all_reduce(whole)
        else:
            exchange.after_step()
        seconds.append(time.perf_counter() - began)
    sent = channel.sent if exchange is None else exchange.bytes_sent_per_step(model, HOSTS)
    return {"seconds": seconds[1:], "sent": sent}


def speed(megabytes: float, work: Callable[..., object], *args: object) -> str:
    """MB/s, the best of five."""
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        work(*args)
        best = min(best, time.perf_counter() - began)
    return f"{megabytes / best:.0f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
