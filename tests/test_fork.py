"""Native kernels in a forked process, where the parent's OpenMP threads do not exist any more."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from fqtstats import quantizer
from fqtstats.ops import convolution1, convolution8, product1, product8
from fqtstats.ops.codes import Affine, Codes, Geometry
from fqtstats.quantizers.storage import store
from fqtstats.random import stream

SECONDS = 30


def codes(bits, *shape):
    generator = torch.Generator().manual_seed(bits)
    return Codes.pack(
        torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8), bits, Affine(torch.ones(1))
    )


def results():
    """Of every operation, on work large enough to be split."""
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    geometry = Geometry(padding=(1, 1))
    found = []
    for name in ("ptq", "bhq"):  # quantize, householder
        stored = store(quantizer(name, bits=4), x, stream())
        found += [stored.codes.data, stored.decode()]
    for bits, linear, convolution in ((8, product8, convolution8), (1, product1, convolution1)):
        a, w = codes(bits, 256, 512), codes(bits, 512, 512)
        image, kernel, dy = codes(bits, 8, 64, 14, 14), codes(bits, 64, 64, 3, 3), codes(bits, 8, 64, 14, 14)
        found += [
            linear.linear(a, w, None),
            linear.linear_grad_input(a, w),
            linear.linear_grad_weight(a, a),
            convolution.convolution(image, kernel, geometry),
            convolution.convolution_grad_input(dy, kernel, geometry, (14, 14)),
            convolution.convolution_grad_weight(dy, image, geometry, (3, 3)),
        ]
    return found


def child(expected, pipe):
    torch.set_num_threads(1)
    pipe.send([torch.equal(a, b) for a, b in zip(results(), expected, strict=True)])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_computes_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = results()
    finally:
        torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(expected, sender))
    process.start()
    try:
        assert receiver.poll(SECONDS), "the child hangs"
        assert all(receiver.recv())
        process.join(SECONDS)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
