"""What each architecture's loader in llama.cpp reads: a table, and two look-ups.

`general.architecture` names the loader. A file it cannot load is worse than no file, so only
architectures that are known to read a fused `attn_qkv` are fused without being told to. The same
holds for `ffn_gate_up_exps` (field `gate_up`).

Where the rows come from (field `proof`), all for llama.cpp of November 2026:
- measured: a random model was fused and both files loaded; the logits were bit-identical (or the
  loader crashed, for the rows that say so).
- source: read from the loader's source: it calls create_tensor_qkv and its graph build_qkv (or
  requires separate or fused weights), not run.
Since when (field `since`): the oldest of the builds in scripts/data/loaders.tsv (April to October
2026, measured) that reads a fused file, as do all after it. Who is not in that file was tried with
llama.cpp of November 2026 alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from gguf_fuse.planning.fusions import GATE_UP, SSM_IN, Fusion, Stack

TRIED = "November 2026"  # the newest llama.cpp that any row was measured with

Proof = Literal["measured", "source", "none"]


class Loader(Enum):
    """What a loader does with a fused tensor; see `phrase`."""

    READS_FUSED = "reads fused {}"
    NEEDS_SEPARATE = "needs separate {}"
    CRASHES = "crashes on fused {}"
    ALREADY_FUSED = "always has fused {}"
    NO_ATTENTION = "has no attention of this kind"
    UNKNOWN = "is not known to read fused {}"

    def phrase(self, words: str = "Q, K and V") -> str:
        """Completes "its loader ..."; words: what is fused."""
        return self.value.format(words)


class Build(NamedTuple):
    """A build of llama.cpp, and when it was made."""

    number: int
    when: str

    def __str__(self) -> str:
        return f"b{self.number} ({self.when})"


@dataclass(frozen=True, slots=True)
class Reads:
    """What a loader does with the fused tensors of one fusion.

    biases, scales: whether the fused path of the graph applies them. since: None where older builds
    were not tried.
    """

    loader: Loader
    proof: Proof
    biases: bool = True
    scales: bool = True
    since: Build | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row. qkv: of attn_qkv. gate_up: of ffn_gate_up_exps, in place of ffn_gate_exps and
    ffn_up_exps. experts: of ffn_gate_exps and the like, in place of a tensor for each expert.
    ssm_in: of attn_qkv and attn_gate, in place of ssm_in.
    """

    name: str
    qkv: Reads
    gate_up: Reads = Reads(Loader.UNKNOWN, "none", scales=False)
    experts: Reads = Reads(Loader.UNKNOWN, "none", biases=False, scales=False)
    ssm_in: Reads = Reads(Loader.UNKNOWN, "none", biases=False, scales=False)
    # The encoders' graph splits a fused tensor into three equal parts.
    equal_rows: bool = False
    # Q has twice the rows: per head the query, then a gate (qwen3next, qwen35).
    gated_q: bool = False
    # Its layers that predict further tokens (MTP) are read fused alone.
    mtp_needs_fused: bool = False
    # Norms of whole rows of Q and K, where the file has them, abort beside a fused tensor.
    row_norms_abort: bool = False

    def reads(self, fusion: Fusion) -> Reads:
        if isinstance(fusion, Stack):
            return self.experts
        if fusion is SSM_IN:
            return self.ssm_in
        return self.gate_up if fusion is GATE_UP else self.qkv


_ROWS: dict[tuple[Loader, Proof], str] = {
    (Loader.READS_FUSED, "measured"): """
        afmoe apertus arcee arctic baichuan bailingmoe bert chameleon chatglm codeshell cohere2
        cohere2moe command-r deci deepseek deepseek2-ocr dots1 dream ernie4_5 ernie4_5-moe eurobert
        exaone exaone-moe exaone4 falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n gemma4 glm4
        glm4moe gpt-oss granite granite_swa granitehybrid granitemoe grok grovemoe hrm_text
        hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 internlm2 jais2 jamba jina-bert-v2 jina-bert-v3
        kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder maple
        mellum mimo2 minicpm minimax-01 minimax-m2 minimax-m3 mistral3 muse-glimmer nanbeige
        nemotron nemotron_h nemotron_h_moe nomic-bert nomic-bert-moe olmo olmo2 olmoe orion
        paddleocr pangu-embedded phi2 phi3 phimoe plamo pockettts qwen2 qwen2moe qwen2vl qwen3
        qwen35 qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe refact rnd1 seed_oss
        smallthinker smollm3 spark2_5 stablelm starcoder2 step35 talkie xverse""",
    (Loader.CRASHES, "measured"): "bailingmoe3 glm5-next kimi-k3 qwen4exp",
    (Loader.NEEDS_SEPARATE, "source"): """
        bitnet deepseek2 deepseek32 deepseek4 dflash dots3note eagle3 gemma4-assistant glm-dsa
        hy_v4 minicpm3 mistral4 plm t5 t5encoder""",
    (Loader.ALREADY_FUSED, "source"): """
        bailingmoe2 bloom cogvlm dbrx falcon gpt2 gptneox graniteswitch jais modern-bert mpt
        neo-bert openelm plamo2 plamo3 qwen starcoder""",
    (Loader.NO_ATTENTION, "source"): "arwkv7 mamba mamba2 rwkv6 rwkv6qwen2 rwkv7",
}

# b8672 is the oldest wheel that was tried. Builds before these say that attn_q is missing, or die
# of a segmentation fault where they load the weights and their graph does not know them (gemma3n,
# mimo2, olmo2, olmoe, qwen3next, qwen35 and qwen35moe).
_APRIL, _LATE_APRIL = Build(8672, "April 2026, or before"), Build(8929, "April 2026")
_MAY, _JULY = Build(9093, "May 2026"), Build(10068, "July 2026")
_AUGUST, _SEPTEMBER = Build(10566, "August 2026"), Build(11063, "September 2026")
_QKV_BUILDS = {
    _APRIL: "bert chatglm glm4 jina-bert-v3 nomic-bert nomic-bert-moe phi2 phi3",
    _LATE_APRIL: """
        apertus arcee baichuan cohere2 command-r deci deepseek dots1 ernie4_5 ernie4_5-moe exaone
        exaone4 falcon-h1 gemma gemma2 gemma3 glm4moe gpt-oss granite granitehybrid granitemoe
        hunyuan-dense internlm2 jamba jina-bert-v2 lfm2 lfm2moe llama llama4 minicpm mistral3
        nemotron olmo orion qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss
        smallthinker smollm3 stablelm starcoder2 xverse""",
    _MAY: "mimo2",
    _JULY: "hy_v3",
    _AUGUST: "granite_swa",
    _SEPTEMBER: """
        cohere2moe deepseek2-ocr gemma3n gemma4 nemotron_h olmo2 olmoe qwen35 qwen35moe
        qwen3next""",
}
_GATE_UP_BUILDS = {
    _APRIL: "deepseek2 deepseek2-ocr gemma4 mistral4 qwen35moe qwen3next",
    _JULY: "hy_v3",
    _AUGUST: "granite_swa",
    _SEPTEMBER: "cohere2moe qwen4exp",
}


def _by_name(builds: dict[Build, str]) -> dict[str, Build]:
    return {name: build for build, names in builds.items() for name in names.split()}


_QKV_SINCE, _GATE_UP_SINCE = _by_name(_QKV_BUILDS), _by_name(_GATE_UP_BUILDS)


# gemma4's own fused code adds no bias; the fused paths of the others apply no scale in some layers
# (nor do their separate paths today, but a loader that began with those would break such files).
# hrm_text's loader asks for a layer's scale by the form of another layer: where only one of the two
# is fused, it misses the scale and refuses the file.
_NO_BIASES = {"gemma4"}
_NO_SCALES = {"gemma3n", "hrm_text", "kimi-linear", "mimo2"}
_ROW_NORMS_ABORT = {"jina-bert-v2"}  # bert.cpp reshapes a view of the fused result
_GATED_Q = {"qwen3next", "qwen35", "qwen35moe", "qwen4exp"}
# Layers that predict further tokens (nextn_predict_layers): graph_mtp in llama.cpp's src/models.
# mimo2's aborts without a fused attn_qkv ("MIMO2 MTP requires fused attn_qkv"): measured. Others
# call build_qkv, which takes both: the drafts of cohere2moe, glm4moe, hy_v3, qwen35, qwen35moe,
# qwen3next and step35 are the same, measured; nemotron_h_moe was read, not run. exaone4,
# exaone-moe, glm4 and bailingmoe2 have no such graph. None that reads fused layers wants these
# separate.
_MTP_NEEDS_FUSED = {"mimo2"}

# Loaders that look for ffn_gate_up_exps.weight first (create_tensor_gate_up_exps, or gemma4's own
# code); all others want gate and up separate. None reads a bias of the fused tensor. A scale of
# ffn_up_exps would be applied to both halves, and is loaded only where ffn_up_exps.weight is.
# All of them are measured.
_GATE_UP = set(
    """
    cohere2moe deepseek2 deepseek2-ocr gemma4 granite_swa hy_v3 mistral4 qwen35moe qwen3next
    qwen4exp
    """.split()
)


# Loaders that once read experts one by one and now want them stacked (create_tensor of
# LLM_TENSOR_FFN_GATE_EXPS); others never had such files. All of them are measured.
_ONCE_ONE_BY_ONE = {"grok", "llama", "minicpm", "refact"}
# Of all loaders that know a tensor ssm_in, the only one that reads others in its place.
_SSM_IN = {"qwen3next"}


def _reads_newer(name: str, measured: set[str]) -> Reads:
    if name in measured:
        return Reads(Loader.READS_FUSED, "measured", biases=False, scales=False)
    return Reads(Loader.UNKNOWN, "none", biases=False, scales=False)


def _gate_up(name: str) -> Reads:
    if name in _GATE_UP:
        since = _GATE_UP_SINCE.get(name)
        return Reads(Loader.READS_FUSED, "measured", biases=False, scales=False, since=since)
    return Reads(Loader.NEEDS_SEPARATE, "source", scales=False)


# Vision and audio encoders (general.architecture = clip), by projector type: the names in
# tools/mtmd/clip-impl.h. Those that read attn_qkv are built by clip_graph::build_vit, which splits
# it by n_head (so K and V must have Q's rows) and applies no scale. Of its other users, gemma4v
# clamps by the weight's name, deepseekocr2 has fewer heads for K and V, and the whisper encoders
# assert that Q and V, not K, have biases of their own.
_PROJECTORS: dict[tuple[Loader, Proof], str] = {
    (Loader.READS_FUSED, "measured"): "gemma3 internvl janus_pro pixtral",
    (Loader.READS_FUSED, "source"): """
        deepseek4v deepseekocr dots3note_a dots3note_v dots_ocr glm4v glm5v hunyuanvl idefics3
        kimik25 kimivl lfm2 lightonocr ling3vl llama4 mimo_audio minimax_m3 muse-glimmer
        nemotron_v2_vl paddleocr phi4 qwen3a resampler step3vl""",
    (Loader.CRASHES, "source"): "glma meralion musicflamingo qwen2a ultravox voxtral",
    (Loader.NEEDS_SEPARATE, "source"): """
        adapter conformer deepseekocr2 gemma3na gemma3nv gemma4a gemma4v granite4_vision
        granite_speech ldp ldpv2 lfm2a minicpmv4_6 mlp mlp_norm parakeet pockettts_gen
        pockettts_spkenc qwen2.5vl_merger qwen2vl_merger qwen3tts_gen qwen3tts_spkenc youtuvl""",
    (Loader.ALREADY_FUSED, "source"): "qwen3vl_merger cogvlm mimovl exaone4_5",
    (Loader.NO_ATTENTION, "source"): "gemma4ua gemma4uv yasa2",
}
# qwen2.5o names two encoders in one file.
_QWEN25O = {"audio": "qwen2a", "vision": "qwen2.5vl_merger"}


def _encoder(name: str, loader: Loader, proof: Proof) -> Architecture:
    return Architecture(f"clip ({name})", Reads(loader, proof, scales=False), equal_rows=True)


ARCHITECTURES = {
    name: Architecture(
        name,
        Reads(
            loader,
            proof,
            biases=name not in _NO_BIASES,
            scales=name not in _NO_SCALES,
            since=_QKV_SINCE.get(name),
        ),
        _gate_up(name),
        _reads_newer(name, _ONCE_ONE_BY_ONE),
        _reads_newer(name, _SSM_IN),
        gated_q=name in _GATED_Q,
        mtp_needs_fused=name in _MTP_NEEDS_FUSED,
        row_norms_abort=name in _ROW_NORMS_ABORT,
    )
    for (loader, proof), names in _ROWS.items()
    for name in names.split()
}

PROJECTORS = {
    name: _encoder(name, loader, proof)
    for (loader, proof), names in _PROJECTORS.items()
    for name in names.split()
}


def architecture(name: str) -> Architecture:
    """The row of a text model's architecture; a row that says UNKNOWN where the table has none."""
    return ARCHITECTURES.get(name) or Architecture(name, Reads(Loader.UNKNOWN, "none"))


def projector(name: str, modality: str = "vision") -> Architecture:
    """The row of an encoder's projector type; UNKNOWN where the table has none."""
    if name == "qwen2.5o":
        name = _QWEN25O[modality]
    return PROJECTORS.get(name) or _encoder(name, Loader.UNKNOWN, "none")
