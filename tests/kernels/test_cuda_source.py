"""What the CUDA C++ sources share with Python stands in Python alone."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_dali.kernels import cuda_source
from nemo_dali.kernels.gather import gpu as gather_gpu
from nemo_dali.kernels.letterbox import gpu as letterbox_gpu
from nemo_dali.kernels.mosaic import gpu as mosaic_gpu
from tests.helpers import cuda_compile
from tests.helpers.ptx import launches

SOURCES = [mosaic_gpu.SOURCE, gather_gpu.SOURCE, letterbox_gpu.SOURCE]
DEFINITION = r"(?:\bint|\buint4|#define)\s+{}\b(?:\[\])?(?:\s*=|\s+\w)"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.file)
def test_a_source_uses_what_its_launcher_defines_and_defines_none_of_it(source):
    own = "".join((Path(cuda_source.__file__).parent / file).read_text() for file in (*source.headers, source.file))
    text = cuda_source.text_of(source)
    for name in (*source.constants, *source.tables):
        assert re.search(rf"\b{name}\b", re.sub("//.*", "", own)), name
        assert len(re.findall(DEFINITION.format(name), text)) == 1, name
    for name, value in source.constants.items():
        assert f"constexpr int {name} = {value};" in text


def test_one_text_gives_a_name_one_number():
    other = replace(letterbox_gpu.SOURCE, constants={**letterbox_gpu.SOURCE.constants, "LANES": 64})
    with pytest.raises(ValueError, match=r"LANES \(64\) must be 32"):
        cuda_source.text_of(mosaic_gpu.SOURCE, other)


def test_nvrtc_writes_into_no_object_that_python_shares():
    """A log of no words is a single byte, and Python has one object for all strings of that byte."""
    launches.compile_text('extern "C" __global__ void nothing() {}', launches.FAST)
    file = io.BytesIO(bytes(range(256)))
    assert [file.read(1)[0] for _ in range(256)] == list(range(256))
    assert cuda_compile.room_for(1) is not cuda_compile.room_for(1)
