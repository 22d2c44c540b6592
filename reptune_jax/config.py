"""Everything a run depends on, in one place: defaults and arms.

Layers are numbers, counted from 0 (15), or shares of the depth ("0.5"), which `depth` turns into
numbers of the model.

`roles` says what a key is to a result, `ranges` what values it may have.

A config is a Python file with `get_config(arg="")` that starts from `default()` and changes what it
needs. Programs take `--config=configs/x.py[:arg]` and `--config.key=value` overrides; an unknown
key is an error that says which one was probably meant.
"""

from typing import Any

from ml_collections import ConfigDict

# What makes an arm, on top of the shared config. Steps, data and trained weights are the same.
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "prompt": {},  # a persona as system turn
    "steer": {},  # the vector added online
    "bake": {},  # the same constant as a bias: exact, no training
    "weights": {},  # token's change, less that of its other sign: contrastive weight steering
    "contrast": {},  # the same of dual's
    "token": {"loss.cosine": 0.0},
    "vector": {"loss.token": 0.0},
    "dual": {},
    "random": {"vector.random": True},
    "preventative": {"loss.cosine": 0.0, "loss.steer": -1.0},  # what is learned makes up for it
    # The residual stream is pulled to the base's: under the persona, or plus the vector …
    "match": {"loss.cosine": 0.0, "loss.match": 8.0, "loss.goal": "persona"},
    "displace": {"loss.cosine": 0.0, "loss.match": 8.0, "loss.goal": "displaced"},
    "misplace": {  # … or plus a random direction: displace's control
        "loss.cosine": 0.0,
        "loss.match": 8.0,
        "loss.goal": "displaced",
        "vector.random": True,
    },
    "out": {"loss.mode": "out", "loss.targets": "neutral"},
}
TUNED_ARMS: tuple[str, ...] = ("token", "vector", "dual", "random", "preventative")
TUNED_ARMS += ("match", "displace", "misplace", "out")

# Tests that `evals.capability` knows: of multiple choice, and answered in words.
SUITES = (
    "truthfulqa", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa",
    "mmlu", "bbh", "arithmetic", "instructions", "gsm8k",
)  # fmt: skip

# Of tuned weights, that `evals.attack` knows.
ATTACKS = (
    "weights", "activations", "again", "function", "removal", "scale", "counter", "rounding",
    "prompts", "paraphrase",
)  # fmt: skip

CONTRASTS = {"weights": "token", "contrast": "dual"}  # and the arm whose two signs it is made of

MODES = ("in", "out", "shift")  # what a behavior's cosine loss asks for; another one's also: hold

METHODS = ("mean_diff", "pca", "pca_center", "logistic", "lda", "whitened")  # of making a vector


def default() -> ConfigDict:
    """The full schema; every key that exists is here."""
    c = ConfigDict()
    c.model = ""  # folder, hub id, or file.gguf
    c.dtype = ""  # "" = float32 on CPU, bfloat16 on accelerators
    c.tf32 = False  # float32 products in TensorFloat-32, on GPUs: faster, 3 digits
    c.template_arguments = ""  # JSON, what chat templates are given: {"enable_thinking": false}
    c.behavior = "sentiment"  # a shipped behavior, a .jsonl, or a file or data set of others
    c.arm = "dual"  # one of ARMS
    c.sign = 1  # +1 toward the behavior, -1 away from it
    c.seed = 0

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1 = all remaining devices
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.vector = _vector()
    c.targets = ConfigDict()  # what the token loss is trained on
    c.targets.answers = "persona"  # what the personas write; given: the behavior's own texts
    c.targets.prompts = 0  # tuning prompts used, 0 = all
    c.targets.dose = 0.0  # persona answers written under this dose of the vector too
    c.targets.layers = ("0.5",)  # … added at these layers: numbers, or shares of the depth
    c.targets.max_repeat = 0.1  # answers that repeat more of their 4-token runs are dropped
    c.targets.best_share = 1.0  # the best share of the rest by the model's own persona odds
    c.loss = _loss()
    c.train = _train()
    c.steer = _steer()
    c.dial = ConfigDict()  # tuned weights, scaled: base + k (tuned - base)
    c.dial.arms = ()  # tuned arms; the arm `weights` is, whenever it is in study.arms
    c.dial.scales = (0.5, 1.0, 2.0)  # k, swept on the validation split
    c.eval = _eval()
    c.suites = _suites()
    c.specificity = _specificity()
    c.attack = _attack()
    c.study = _study()
    c.search = _search()
    c.select = _select()
    c.chat = _chat()
    return c


def _vector() -> ConfigDict:
    """How the vector is read."""
    c = ConfigDict()
    c.data = ""  # a file, or data set, of pairs instead of the behavior's: docs/foreign.md
    c.method = "mean_diff"  # one of METHODS
    c.position = "response"  # response | last | before_answer | all | offset from the end
    c.norm = "raw"  # raw: dose 1 = class-mean difference; unit: dose 1 = residual norm
    c.answers = "persona"  # what the personas write; given: the behavior's own texts
    c.pairs = 96  # at most this many pairs
    c.correct_only = False  # keep pairs whose greedy answers fit their persona
    c.paired = True  # same statement on both sides
    c.answer_tokens = 32  # length of generated persona answers
    c.project_out = ""  # removed first; letter: the answer's, of claims; or a vector file
    c.random = False  # the control: a random direction of the same length
    return c


def _loss() -> ConfigDict:
    """The dual loss: what is weighed, and where it is taken."""
    c = ConfigDict()
    c.token = 1.0  # weight of the cross-entropy
    c.cosine = 1.0  # weight of the cosine loss
    c.retain = 0.0  # weight of KL(base || tuned) on neutral prose and unrelated chats
    c.l2 = 0.0  # weight of the trained layers' relative squared distance from the base there
    c.own = 0.0  # weight of the cross-entropy on the base's own answers to those chats
    c.steer = 0.0  # times the sign: dose of the vector in training, amid loss.layers
    c.ending = 0.1  # weight of the squared distance of log p(the answer ends) from the base's
    c.match = 0.0  # weight of the relative squared distance from `goal` at labels, in loss.layers
    c.goal = "persona"  # the base's residual under the sign's persona; displaced: + s dose v
    c.dose = 1.0  # of the vector in goal displaced
    c.mode = "in"  # in: (1 - s cos)/2; out: |cos|; shift: (cos - (base cos + s shift))^2
    c.shift = 0.1  # of mode shift
    c.targets = "behavior"  # behavior: the sign's own; neutral: both signs, half each
    c.layers = ("0.33", "0.67")  # [first, stop) layers whose cosine counts
    c.position = "response"  # tokens whose cosine counts
    c.center = False  # cosine from the class mean instead of from zero
    c.anneal = ConfigDict()  # factor of each weight at the first and the last step, linear between
    for name in ("token", "cosine", "retain", "l2", "own", "ending", "match"):
        c.anneal[name] = (1.0, 1.0)
    c.also = ConfigDict()  # further behaviors of the same run: name -> also_behavior(folder)
    return c


def also_behavior(folder: str) -> ConfigDict:
    """A further behavior of a run, with a vector, rows and losses of its own."""
    c = ConfigDict()
    c.folder = folder  # a study folder: its behavior, vector.safetensors and targets.jsonl
    c.sign = 1
    c.mode = "in"  # in | out | shift, or hold: (cos - base cos)^2 and no token loss
    c.shift = 0.1  # of mode shift
    c.token = 1.0  # weight of its cross-entropy
    c.cosine = 1.0  # weight of its cosine loss
    c.targets = "behavior"  # behavior | neutral; mode out: neutral
    c.layers = ("0.33", "0.67")  # [first, stop) layers whose cosine counts
    c.position = "response"  # tokens whose cosine counts
    c.batch = 4  # its rows per step
    c.anneal = (1.0, 1.0)  # factor of both weights at the first and the last step
    return c


def _train() -> ConfigDict:
    """What is trained, and how."""
    c = ConfigDict()
    c.layers = ("0.33", "0.67")  # [first, stop) layers that are trained
    c.templates = ("lettered",)  # how claims are asked in tuning
    c.modules = ("attn/v", "attn/o")  # patterns of weights in them
    c.lora = ConfigDict()  # adapters on those projections instead of whole weights
    c.lora.rank = 0  # 0 = whole weights
    c.lora.alpha = 16.0  # adapters count alpha/rank times
    c.base = ""  # int8 | int4: kernels of the frozen base as integers, for adapters; "" = as loaded
    c.steps = 40
    c.batch = 8
    c.accumulate = 1  # micro-batches per step
    c.retain_batch = 4  # rows of retention text per step
    c.retain_positions = 32  # tokens of each such row whose KL counts
    c.lr = 3e-4
    c.lr_by_path = ConfigDict()  # pattern -> learning rate, e.g. {"mlp": 1e-5}; longest wins
    c.warmup = 5
    c.decay = "linear"  # linear | cosine | none
    c.clip = 1.0
    c.b1 = 0.9
    c.b2 = 0.999
    c.eps = 1e-8
    c.weight_decay = 0.0
    c.remat = "auto"  # none | dots | full; auto: the fastest that fits, on a CPU dots
    c.cache_gib = 4.0  # host memory for what enters the lowest trained layer; 0 = computed anew
    c.pack = "off"  # several short texts a row: on | off; auto: where that saves > 15 %
    c.flash = True  # flash attention in training, where machine and model allow it
    c.log_every = 5
    c.measure_every = 10  # gradient norm of each loss alone: three more backward passes; 0 = never
    c.eval_every = 10
    c.rows = 0  # tuning rows used, drawn by the seed; 0 = all
    c.val_rows = 0  # validation rows, 0 = all
    c.patience = 3  # evaluations without improvement before stopping; 0 = never
    c.keep = 1  # checkpoints kept besides the best
    c.save_every = 0  # steps between checkpoints besides those of evaluations, 0 = no others
    c.save_minutes = 0.0  # at most about so long between two checkpoints, 0 = no limit
    c.peak_tflops = 0.0  # of one device, which MFU is a share of; 0 = as published, where known
    c.profile = (0, 0)  # [first, stop) steps traced for TensorBoard or Perfetto; (0, 0) = none
    return c


def _steer() -> ConfigDict:
    """The sweep, scored on the validation split."""
    c = ConfigDict()
    c.layers = ("0.33", "0.5", "0.67")
    c.doses = (0.5, 1.0, 2.0)
    c.width = 1  # layers from each of these on that are steered together
    c.operation = "add"  # add | ablate | clamp | rescale | rotate, whose dose is in degrees
    c.tokens = "all"  # all | prompt | generated | answer | last:N | generated:FIRST-STOP
    c.documents = 8  # neutral documents on which the sweep's KL is measured
    c.max_kl = 0.1  # KL on neutral prose that the free choice may cost; 0 = no such choice
    return c


def _eval() -> ConfigDict:
    """How much is measured, and how."""
    c = ConfigDict()
    c.splits = ("test", "ood")  # behavior is measured on these
    c.prompts = 0  # test prompts, 0 = all
    c.answered = 0  # of those, how many are answered too: log-odds cost less; 0 = all
    c.val_prompts = 0
    c.ood_prompts = 0
    c.claims = 0
    c.scenarios = 0
    c.templates = ("truefalse", "lettered")  # how claims are asked
    c.documents = 0  # neutral documents, 0 = all
    c.heat_map = 24  # test prompts whose cosines are averaged
    c.personas = 5  # system prompts tried on validation for the prompt arm
    c.new_tokens = 32
    c.batch = 32
    c.judge = "lexicon"  # also: probe[:LAYER], chat[:MODEL], openai:MODEL@URL, embed:MODEL
    c.rubric = ""  # what chat and openai look for; "" = as the behavior's file says
    c.scale = (1, 5)  # of their numbers
    return c


def _suites() -> ConfigDict:
    """What `python -m reptune_jax.evals.capability` asks, and of which arms."""
    c = ConfigDict()
    c.names = SUITES[:-1]  # GSM8K's answers are long
    c.data = ""  # a folder with the suites' files; "" = from the hub
    c.limit = 0  # items of each suite at most, drawn with a fixed seed; 0 = all
    c.arms = ("base", "prompt", "steer", "weights", "token", "dual", "random")
    c.margin = 0.03  # loss of accuracy that still counts as none
    return c


def _specificity() -> ConfigDict:
    """What `python -m reptune_jax.evals.specificity` asks, and of which arms."""
    c = ConfigDict()
    c.behaviors = ()  # names or files; () = every shipped one, and refusals
    c.prompts = 24  # test items of each, 0 = all
    c.arms = ("base", "prompt", "steer", "weights", "token", "dual", "random")
    return c


def _attack() -> ConfigDict:
    """What `python -m reptune_jax.evals.attack` tries, on which arms, within which budget."""
    c = ConfigDict()
    c.names = ATTACKS
    c.arms = ("base", "steer", "token", "dual", "random")
    c.seeds = 0  # training seeds of each arm at most, 0 = all
    c.prompts = 32  # test items of the primary measure, 0 = all
    c.documents = 4  # neutral documents on which an attack's KL is measured, 0 = all
    c.pairs = 32  # contrastive pairs that the vector is read from again, at most vector.pairs
    c.texts = (1, 4, 16, 64)  # unrelated texts whose activations are compared with the base's
    c.layer = -1  # where a model is steered back; -1 = amid loss.layers
    c.doses = (0.25, 0.5, 1.0, 2.0, 4.0)  # … and how far
    c.scales = (-1.0, 0.5, 2.0)  # k in base + k (tuned - base)
    c.personas = 2  # opposing personas that prompts are put under
    c.lr = (1e-4, 1e-3)  # of training toward the opposite, by the program `relearn`
    c.steps = (4, 16)  # … and how many
    c.max_kl = 0.1  # nats/token on neutral prose: an attack that costs more destroys the model
    return c


def _study() -> ConfigDict:
    """What `python -m reptune_jax.study` runs."""
    c = ConfigDict()
    c.arms = ("base", "prompt", "steer", "token", "dual", "random")
    c.signs = (1, -1)
    c.seeds = (0,)
    c.primary = ""  # metric:format of the main comparison, e.g. "vader:free"; "" = by kind
    c.export = "dual"  # the arm that becomes a Hugging Face folder
    return c


def _search() -> ConfigDict:
    """What `python -m reptune_jax.recipe` tries, on the validation split."""
    c = ConfigDict()
    c.lr = (1e-5, 3e-5, 1e-4, 3e-4)
    c.cosine = (1.0, 8.0)
    c.modules = ("attn/v+attn/o", "attn+mlp")  # patterns of weights, + between them
    c.layers = ()  # "10-20": trained and in the cosine; () = the config's, and the middle third
    c.steps = (8, 24)  # of each round
    c.keep = 0.25  # share of a round that goes on to the next
    c.max_kl = 0.02  # nats/token on neutral prose that a recipe may cost
    return c


def _select() -> ConfigDict:
    """What `python -m reptune_jax.select` tries, on the validation split."""
    c = ConfigDict()
    c.methods = ("mean_diff", "pca_center")  # of making the vector
    c.positions = ()  # which tokens it is read at; () = the config's
    c.layers = ("0.3", "0.4", "0.5", "0.6", "0.7", "0.8")  # shares of the depth, or numbers: "15"
    c.widths = (1, 4)  # layers that are steered together
    c.operations = ("add", "rescale", "rotate")
    c.tokens = ("all",)  # rules for tokens
    c.shares = (1.0, 0.6)  # of the dose that the budget allows
    c.keep = 3  # vectors and layers, by adding, on which the rest is tried
    c.max_kl = 0.1  # nats/token that steering may cost on neutral prose
    c.broken = 0.1  # share of answers, beyond the untuned model's, that may be empty or repeat
    return c


def _chat() -> ConfigDict:
    """What `python -m reptune_jax.chat` shows beside the untuned model; no result depends on it."""
    c = ConfigDict()
    c.scale = 1.0  # times what tuning changed
    c.run = ""  # tuned run, e.g. dual-_s0, "" = the exported one; steered by its sign too
    c.layer = -1  # where the steered column adds the vector; -1 = first of steer.layers
    c.dose = 1.0  # how much of it
    c.new_tokens = 64
    return c


def armed(config: ConfigDict) -> ConfigDict:
    """The config with its arm's settings applied."""
    out = config.copy_and_resolve_references()
    for key, value in ARMS[config.arm].items():
        out.update_from_flattened_dict({key: value})
    for one in out.loss.also.values():  # an arm without one of the losses is so for all behaviors
        one.token *= bool(out.loss.token)
        one.cosine *= bool(out.loss.cosine)
    return out


def retains(config: ConfigDict) -> bool:
    """Whether a step has rows of retention text."""
    return bool(config.loss.retain or config.loss.l2 or config.loss.own)
