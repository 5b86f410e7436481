"""Above each figure: its title, its place in the paper, what is drawn and what to look for (HTML)."""

CAPTIONS = {
    "stages": (
        "Three stages",
        "Figure 4",
        "The loss, lambda with the penalty it makes of the regulariser, and the sparsity S (the share of "
        "(token, expert) pairs that are off). Stage I is nearly dense while lambda is tiny, in stage II "
        "the penalty thins the experts out, in stage III lambda only keeps S in place.",
    ),
    "loss": (
        "Training loss",
        "Figure 5",
        "By steps, and by the time that the steps took: stages I and II of a ReLU router cost more time "
        "per step.",
    ),
    "sparsity": (
        "Sparsity",
        "Figure 3",
        "S at every step, without averaging; the band is its mean and standard deviation after the first "
        "100 steps, or after the settling where that is later. (The paper's run: 0.8751 ± 0.0061 around "
        "0.875.)",
    ),
    "validation": (
        "Validation per domain",
        "",
        "The loss in nats per token of each validation shard. The table is of the last validation, the "
        "lowest of a domain in bold.",
    ),
    "layers": (
        "Sparsity of each layer",
        "",
        "lambda steers only the mean over layers: where the experts are spent is the model's choice.",
    ),
    "load": (
        "Load and dead experts",
        "",
        "Tokens of an expert in a step, of the mean over all layers and experts: 1 would be all alike.",
    ),
    "load-by-step": (
        "Tokens of each expert while training",
        "",
        "The share of a step's tokens whose layer activates the expert.",
    ),
    "flips": (
        "Flips",
        "Figure 10",
        "How much of the routing one update changes, on a fixed set of validation tokens. The rate is the "
        "share of (layer, token, expert) triples that were on and are off, or the other way round (Eq. "
        "14); the count is E times that, experts per layer and token (Eq. 15).",
    ),
    "stage-times": (
        "Time of the stages",
        "Table 6",
        "The sum of the steps' times. (The paper's runs had 120 billion tokens.)",
    ),
    "speed": (
        "Throughput and memory",
        "",
        "FLOPs by the paper's formula: at k experts per token (line), and of the experts that were on "
        "(dotted).",
    ),
    "optimizer": ("Gradient and learning rate", "", "The gradient's norm before it was clipped."),
    "heat": (
        "Tokens of each layer and expert",
        "Figure 8b, c",
        "The share of all tokens that a layer sends to an expert; less than an eighth of k/E is left empty: "
        "1/64 where k/E is the paper's 1/8.",
    ),
    "layer-sparsity": (
        "Sparsity by layer",
        "Figure 8d",
        "1 - (mean active experts) / E of each layer (dotted: their mean), on the validation tokens.",
    ),
    "domains": (
        "Tokens of each expert by domain",
        "Figures 9, 12",
        "The share of a domain's tokens that a layer sends to each expert. Dashed: k/E, what every expert "
        "would get if all were alike. Bars of unlike height over one expert are specialisation. With all "
        "layers chosen this is the paper's Figure 12, with the first, middle and last its Figure 9.",
    ),
    "specialisation": (
        "Specialisation in one number per layer",
        "",
        "The mean over domains of the total-variation distance between the domain's split of tokens over "
        "experts and the mean split: 0, all domains are routed alike; 1, domains share no expert.",
    ),
    "active-by-domain": (
        "Experts per token by domain",
        "Figure 11",
        "Mean active experts of each layer (dashed: k): a ReLU router may spend more where text is "
        "harder.",
    ),
    "frequency": (
        "Experts by token frequency",
        "Figure 7",
        "Token ids that occur often enough to say something (20 times), from the fewest experts to the "
        "most, and how frequent they are (dashed: k). The paper finds that rare tokens get more experts: "
        "a clearly negative Spearman correlation.",
    ),
    "token-experts": (
        "Tokens of each expert",
        "Table 12",
        "P(e | v), the share of a token's occurrences that reach expert e: of the tokens with P of 0.97 "
        "or more the eight most frequent. An expert without such tokens shows, in grey, the three with "
        "the largest P. (Where k/E is near 1, a P near 1 is no specialisation. <code>--stats-layers "
        "all</code> counts every layer.)",
    ),
    "text": (
        "Text, token by token",
        "",
        "Point at a token, or tap it, to see which experts took it in every layer and with what gate.",
    ),
}
