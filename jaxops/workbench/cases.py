"""A usual and an awkward call of each operator, in words: what is certified, and what a command takes by itself."""

import dataclasses

from jaxops.workbench.call import Problem, nearest

DTYPES = ("bfloat16", "float32")
DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operator.

    shape: "main", a size it is used at, "awkward", one that divides no tile, or the name of a further one. operands,
    options: in the words of `call.call`. kernel: whether it is certified to run as a kernel; False where the operator
    has none and XLA serves.
    """

    operator: str
    shape: str
    operands: tuple[str, ...]
    options: tuple[str, ...] = ()
    kernel: bool = True

    def __str__(self) -> str:
        """As "x[8192, 4096], scale[4096], eps=1e-6"."""
        names = [word.partition(":")[0].partition("=") for word in self.operands]
        described = [f"{name}[{', '.join(sizes.split('x')) if sizes else ''}]" for name, _, sizes in names]
        return ", ".join([*described, *self.options])


def _two(operator: str, main: str, awkward: str, options: str = "", *, kernel: bool = True) -> tuple[Case, Case]:
    """The main case and the awkward one, which has the options."""
    return (
        Case(operator, "main", tuple(main.split()), kernel=kernel),
        Case(operator, "awkward", tuple(awkward.split()), tuple(options.split()), kernel=kernel),
    )


CASES = (
    *_two("rms_norm", "x=8192x4096 scale=4096", "x=3x37x1000 scale=1000", "scale_offset=1.0"),
    *_two("layer_norm", "x=8192x4096 scale=4096 bias=4096", "x=3x37x1000 scale=1000 bias=1000"),
    *_two(
        "add_rms_norm",
        "x=8192x4096 residual=8192x4096 scale=4096",
        "x=3x37x1000 residual=3x37x1000 scale=1000",
        "scale_offset=1.0",
    ),
    *_two(
        "add_layer_norm",
        "x=8192x4096 residual=8192x4096 scale=4096 bias=4096",
        "x=3x37x1000 residual=3x37x1000 scale=1000 bias=1000",
    ),
    *_two("batch_norm", "x=16x64x64x512 scale=512 bias=512", "x=3x37x300 scale=300 bias=300", "eps=0.001"),
    Case("group_norm", "main", ("x=16x64x64x512", "scale=512", "bias=512"), ("num_groups=32",)),
    Case("group_norm", "awkward", ("x=3x37x30", "scale=30", "bias=30"), ("num_groups=6",)),
    *(
        Case(name, shape, (operand,), tuple(options.split()), kernel=False)
        for name, main, awkward in (
            ("max_pool", "window_shape=(2,2) strides=(2,2)", "window_shape=(3,3) strides=(2,2) padding=SAME"),
            ("avg_pool", "window_shape=(2,2) strides=(2,2)", "window_shape=(3,3) strides=(2,2) padding=SAME"),
            ("adaptive_avg_pool", "output_shape=(8,8)", "output_shape=(5,3)"),
            ("global_max_pool", "", ""),
            ("global_avg_pool", "", ""),
        )
        for shape, operand, options in (
            ("main", "inputs=16x64x64x512", main),
            ("awkward", "inputs=3x37x30x129", awkward),
        )
    ),
    *_two("instance_norm", "x=16x64x64x512 scale=512 bias=512", "x=3x37x300 scale=300 bias=300", "eps=0.001"),
    Case(
        "dot_product_attention",
        "main",
        ("query=4x4096x8x128", "key=4x4096x8x128", "value=4x4096x8x128"),
        ("is_causal=True",),
    ),
    Case(
        "dot_product_attention",
        "awkward",
        (
            *("query=2x1000x6x64", "key=2x1000x2x64", "value=2x1000x2x64"),
            *("query_seq_lengths=2:int32", "key_value_seq_lengths=2:int32"),
        ),
        ("is_causal=True", "local_window_size=(255,0)"),
    ),
    *_two(
        "decode_attention",
        "query=8x32x128 key=8x8192x8x128 value=8x8192x8x128 lengths=8:int32<8193",
        "query=3x5x6x128 key=3x1000x2x128 value=3x1000x2x128 lengths=3:int32<1001 sinks=6:float32",
        "local_window_size=255 logits_soft_cap=30.0",
    ),
    *_two(
        "paged_attention",
        "query=8x32x128 key_pages=4096x16x8x128 value_pages=4096x16x8x128 page_table=8x512:int32<4096"
        " lengths=8:int32<8193 query_starts=9:int32<9",
        "query=77x12x128 key_pages=50x64x4x128:int8 value_pages=50x64x4x128:int8 key_scales=50x4x64:float32"
        " value_scales=50x4x64:float32 page_table=5x9:int32<50 lengths=5:int32<577 query_starts=6:int32<78",
        "local_window_size=255",
    ),
    *_two(
        "linear_cross_entropy",
        "x=8192x2048 weight=2048x65536 labels=8192:int32",
        "x=1000x512 weight=512x50257 labels=1000:int32",
        "label_smoothing=0.1 z_loss=0.0001 logits_soft_cap=30.0",
    ),
    *_two(
        "linear_distillation",
        "x=8192x1024 weight=1024x65536 teacher_x=8192x2048 teacher_weight=2048x65536",
        "x=1000x256 weight=256x50257 bias=50257 teacher_x=1000x512 teacher_weight=512x50257 teacher_bias=50257",
        "temperature=2.0",
    ),
    *_two("softmax", "x=8192x4096", "x=3x37x1000 where=3x37x1000:bool", "temperature=0.5"),
    *_two("gelu", "x=8192x4096", "x=3x37x1000", "approximate=False", kernel=False),
    *_two("silu", "x=8192x4096", "x=3x37x1000", kernel=False),
    *_two("relu", "x=8192x4096", "x=3x37x1000", kernel=False),
    *_two("squared_relu", "x=8192x4096", "x=3x37x1000", kernel=False),
    *_two(
        "gated_linear_unit",
        "x=8192x4096 w_gate=4096x11008 w_up=4096x11008",
        "x=3x37x1000 w_gate=1000x257 w_up=1000x257",
    ),
    Case("gated_linear_unit", "narrow", ("x=1000x64", "w_gate=64x192", "w_up=64x192")),
    *_two(
        "rope",
        "x=4x4096x8x128 positions=4096:int32",
        "x=3x37x5x66 positions=3x37:int32<1000",
        "base=500000.0 scaling=2.0",
    ),
    *_two(
        "rope_projection",
        "x=4x2048x4096 w=4096x32x128 positions=2048:int32",
        "x=3x37x1000 w=1000x4x32 positions=3x37:int32<1000 bias=4x32",
        "base=500000.0 scaling=2.0",
    ),
    *_two(
        "ragged_dot",
        "lhs=8192x4096 rhs=8x4096x4096 group_sizes=8:int32<1025",
        "lhs=1000x1000 rhs=5x1000x257 group_sizes=5:int32<300 lhs_rows=777:int32<1000 out_rows=777:int32<1000"
        " out_weights=777:float32",
        "out_size=1000",
    ),
    *_two(
        "quantized_matmul",
        "x=16x4096 w=4096x11008:int8 scales=1x11008:float32",
        "x=3x37x1024:int8 x_scales=3x37x1 w=1024x257:int4 scales=8x257 bias=257",
    ),
    Case(
        "quantized_matmul",
        "narrow",
        ("x=333x1024", "w=1024x192:int4", "scales=8x192", "zeros=8x192", "bias=192"),
    ),
    *_two(
        "block_sparse_matmul",
        "x=4096x4096 w=205x128x128 rows=205:int32<32 offsets=33:int32<206",
        "x=3x37x384 w=5x128x256 rows=5:int32<3 offsets=3:int32<6 bias=512 residual=3x37x512",
        "activation=jaxops.silu",
    ),
    *_two(
        "sparse_2_4_matmul",
        "x=16x4096 w=2048x11008 indices=512x11008:uint8<256",
        "x=3x37x1000 w=500x257 indices=125x257:uint8<256 bias=257",
        kernel=False,
    ),
    Case(
        "conv",
        "main",
        ("lhs=8x28x28x256", "rhs=3x3x256x256", "bias=256"),
        ("window_strides=(1,1)", "padding=SAME", "dimension_numbers=('NHWC','HWIO','NHWC')", "activation=jaxops.relu"),
    ),
    Case(
        "conv",
        "awkward",
        ("lhs=3x9x7x30", "rhs=3x2x30x17", "bias=17", "residual=3x9x7x17"),
        ("window_strides=(1,1)", "padding=SAME", "rhs_dilation=(2,1)", "dimension_numbers=('NHWC','HWIO','NHWC')"),
    ),
    Case(
        "conv",
        "depthwise",
        ("lhs=8x56x56x256", "rhs=3x3x1x256", "bias=256"),
        (
            "window_strides=(1,1)",
            "padding=SAME",
            "dimension_numbers=('NHWC','HWIO','NHWC')",
            "feature_group_count=256",
            "activation=jaxops.relu",
        ),
    ),
    Case(
        "conv",
        "depthwise, awkward",
        ("lhs=3x9x7x300", "rhs=3x2x1x300", "bias=300", "residual=3x9x7x300"),
        (
            "window_strides=(1,1)",
            "padding=SAME",
            "rhs_dilation=(2,1)",
            "dimension_numbers=('NHWC','HWIO','NHWC')",
            "feature_group_count=300",
        ),
    ),
    Case(
        "conv_transpose",
        "main",
        ("lhs=8x28x28x256", "rhs=4x4x256x256", "bias=256"),
        ("strides=(2,2)", "padding=SAME", "activation=jaxops.relu"),
        kernel=False,
    ),
    Case(
        "conv_transpose",
        "awkward",
        ("lhs=3x9x7x30", "rhs=3x2x30x17", "bias=17", "residual=3x18x7x17"),
        ("strides=(2,1)", "padding=SAME"),
        kernel=False,
    ),
    Case(
        "quantized_conv",
        "main",
        ("lhs=8x28x28x256:int8", "rhs=3x3x256x256:int8", "scales=1x1x1x256:float32", "lhs_scales=8x1x1x1", "bias=256"),
        ("window_strides=(1,1)", "padding=SAME", "dimension_numbers=('NHWC','HWIO','NHWC')", "activation=jaxops.relu"),
        kernel=False,
    ),
    Case(
        "quantized_conv",
        "awkward",
        ("lhs=3x9x7x30", "rhs=3x2x30x17:int4", "scales=3x2x2x17:float32", "bias=17", "residual=3x5x7x17"),
        ("window_strides=(2,1)", "padding=SAME", "dimension_numbers=('NHWC','HWIO','NHWC')"),
        kernel=False,
    ),
    *_two("matmul", "x=8192x4096 w=4096x4096", "x=3x37x1000 w=1000x257 bias=257 residual=3x37x257"),
    Case(
        "matmul",
        "narrow",
        ("x=1000x64", "w=64x192", "bias=192", "residual=1000x192"),
        ("activation=jaxops.silu",),
    ),
)


def usual(operator: str) -> Case:
    """The main case of an operator of the library. Raises `Problem` for an unknown one."""
    for case in CASES:
        if case.operator == operator and case.shape == "main":
            return case
    if ":" in operator:
        raise Problem(f"{operator} needs operands, as in x=8192x4096: no usual ones are known")
    raise nearest("the operator", operator, {case.operator for case in CASES})
