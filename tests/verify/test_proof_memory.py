"""A proof holds a layer or two of a model at a time, however many it has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
LAYER = 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 2048)
"""Bytes of a layer, as fp64."""
PROVE = """
import json, resource, sys
from pathlib import Path
import transformers.models.llama.modeling_llama, megatron.core.models.gpt
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify import logits, parity

source, artifact = map(Path, sys.argv[1:])
spec = Spec.of(source)
rows = parity.computed(source, spec, 1, parity.Sharded(artifact, spec, Grid()))
# ru_maxrss begins with that of the process that started this one
told = Path("/proc/self/status").read_text()
own = int(next(line.split()[1] for line in told.splitlines() if line.startswith("VmHWM")))
peaks = [kilobytes * 1024 for kilobytes in (own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)]
print(json.dumps([logits.failures(**rows), peaks]))
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_layers(maker):
    """Forty layers take what four do, where all of them would be 36 times a layer more."""
    peaks = {}
    for layers in (4, 40):
        source = maker.foreign("Llama", name=f"-{layers}", num_hidden_layers=layers, **WIDE)
        artifact = maker.shards(source, 1, 1)
        done = subprocess.run(
            [sys.executable, "-c", PROVE, str(source), str(artifact)],
            capture_output=True, text=True, check=True, cwd=Path.cwd(),
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536"},
        )  # fmt: skip
        wrong, peaks[layers] = json.loads(done.stdout.splitlines()[-1])
        assert wrong == []
    grown = [more - less for less, more in zip(peaks[4], peaks[40], strict=True)]
    assert max(grown) < 4 * LAYER, (grown, peaks)
