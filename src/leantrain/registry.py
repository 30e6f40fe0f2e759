"""Every method in one table: what `leantrain methods`, the docs and the conformance tests read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row: the name users search for, its room, where its class or function is, and what it does in one line."""

    name: str
    room: str
    class_path: str
    summary: str
    source: str
    """Authors and year, or the project it is taken from."""

    @property
    def card(self) -> str:
        """The method's page, relative to the docs folder."""
        return f"methods/{self.class_path.split('.')[-2]}.md"


METHODS: tuple[Method, ...] = (
    Method("AdamW", "optim", "leantrain.optim.adamw.AdamW",
           "PyTorch's AdamW step with its fused kernel: the baseline everything is measured against.",
           "Loshchilov & Hutter 2019"),
    Method("AdamW8bit", "optim", "leantrain.optim.adamw_low_bit.AdamW8bit",
           "AdamW with its averages stored in 8 bits: a quarter of the optimizer memory.",
           "Dettmers et al. 2022"),
    Method("AdamW4bit", "optim", "leantrain.optim.adamw_low_bit.AdamW4bit",
           "AdamW with its averages stored in 4 bits: an eighth of the optimizer memory.",
           "Li, Chen & Zhu 2023"),
    Method("GaLoreAdamW", "optim", "leantrain.optim.galore.GaLoreAdamW",
           "AdamW whose moments live in a few directions of each gradient matrix: less optimizer memory.",
           "Zhao et al. 2024"),
    Method("GaLoreAdafactor", "optim", "leantrain.optim.galore_adafactor.GaLoreAdafactor",
           "Adafactor in a few directions of each gradient matrix: the second average shrinks to two vectors.",
           "Zhao et al. 2024"),
    Method("QGaLoreAdamW", "optim", "leantrain.optim.q_galore.QGaLoreAdamW",
           "GaLore with 4-bit bases, 8-bit averages and fewer refreshes where subspaces have settled.",
           "Zhang et al. 2024"),
    Method("DCTAdamW", "optim", "leantrain.optim.dct_adamw.DCTAdamW",
           "AdamW in columns of the cosine transform that are chosen anew at every step; no decomposition.",
           "Modoranu et al. 2025"),
    Method("APOLLO", "optim", "leantrain.optim.apollo.APOLLO",
           "Gradients scaled per channel by what Adam would do in a few random directions; nothing else is kept.",
           "Zhu et al. 2025"),
    Method("APOLLOMini", "optim", "leantrain.optim.apollo.APOLLOMini",
           "APOLLO with one random direction and one scale per matrix: next to no optimizer memory.",
           "Zhu et al. 2025"),
    Method("step_in_backward", "optim", "leantrain.optim.in_backward.step_in_backward",
           "Updates each parameter during the backward pass and frees its gradient, with accumulation and clipping.",
           "Lv et al. 2024; Zhao et al. 2024"),
    Method("LocalUpdates", "learn", "leantrain.learn.local_updates.LocalUpdates",
           "Every block of layers learns from a loss of its own, so that only one block's activations are kept.",
           "Belilovsky et al. 2020; Laskin et al. 2020"),
    Method("LayerWise", "learn", "leantrain.learn.layer_wise.LayerWise",
           "One block of layers after the other, the rest frozen: activations, gradients and moments of one block.",
           "Belilovsky et al. 2019; Karkar et al. 2023"),
    Method("Interlayer", "learn", "leantrain.learn.interlayer.Interlayer",
           "Steps that give blocks trained by themselves some of what backpropagation does between layers.",
           "Øland 2024; Arora, Cohen & Hazan 2018; Karkar et al. 2023"),
    Method("Projected", "exchange", "leantrain.exchange.projected.Projected",
           "DDP that sends only the projected gradients of matrices that a low-rank optimizer projects.",
           "Zhao et al. 2024"),
    Method("MajorityVote", "exchange", "leantrain.exchange.majority_vote.MajorityVote",
           "One bit per weight and process, and the majority's sign: 32 times fewer bytes; a minority may lie.",
           "Bernstein et al. 2018, 2019"),
    Method("DeepGradientCompression", "exchange",
           "leantrain.exchange.deep_gradient_compression.DeepGradientCompression",
           "Only the largest thousandth of what momentum has accumulated is sent; the rest waits.",
           "Lin et al. 2018"),
    Method("EntropyCoded", "exchange", "leantrain.exchange.entropy_coded.EntropyCoded",
           "Local training whose changes of the weights travel rounded and entropy-coded: about 2 bits a weight.",
           "Øland & Raj 2015"),
    Method("LocalSGD", "exchange", "leantrain.exchange.local_sgd.LocalSGD",
           "Processes train by themselves and take the mean of their weights every few steps, through any codec.",
           "Stich 2019"),
    Method("DiLoCo", "exchange", "leantrain.exchange.local_sgd.DiLoCo",
           "Processes meet every hundred steps or so; their mean change is the gradient of an outer step.",
           "Douillard et al. 2023"),
    Method("GradientCoding", "exchange", "leantrain.exchange.stragglers.gradient_coding.GradientCoding",
           "Every part of the batch goes to several processes, so that the slowest need not be waited for; exact.",
           "Tandon et al. 2017"),
    Method("SRSGC", "exchange", "leantrain.exchange.stragglers.sequential_coding.SRSGC",
           "Gradient coding over several jobs in flight: what was late is done again in a later round.",
           "Krishnan, Ebrahimi & Khisti 2023"),
    Method("MSGC", "exchange", "leantrain.exchange.stragglers.sequential_coding.MSGC",
           "Gradient coding over several jobs in flight: most work uncoded, and coded parts only for what was late.",
           "Krishnan, Ebrahimi & Khisti 2023"),
    Method("MoNNA", "exchange", "leantrain.exchange.robust.monna.MoNNA",
           "Momentum, and the average of the nearest neighbours' models: training goes on though some processes lie.",
           "Farhadkhani et al. 2022"),
    Method("OutputLoss", "nn", "leantrain.nn.output_loss.OutputLoss",
           "Classification without softmax: each logit's error goes back as it is, or boosted.",
           "Øland et al. 2017"),
    Method("int8_weights", "nn", "leantrain.nn.int8.int8_weights",
           "Weights stored in 8 bits and updated with stochastic rounding: a quarter of the weight memory.",
           "Zhang et al. 2024"),
    Method("probe", "analysis", "leantrain.analysis.probe.probe",
           "What hidden layers do, layer by layer, in six measures; and a module that leaves a network early.",
           "Alain & Bengio 2016"),
    Method("WeightEntropy", "analysis", "leantrain.analysis.weight_entropy.WeightEntropy",
           "A meter of the bits that a model's weights carry while it trains, in three definitions.",
           "Øland & Raj 2015"),
    Method("welore", "compress", "leantrain.compress.welore.welore",
           "A trained model with low-rank factors in place of the matrices that bear it, and tuning of those alone.",
           "Jaiswal et al. 2024"),
)  # fmt: skip
