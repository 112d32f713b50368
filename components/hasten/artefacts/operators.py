"""What the operators of PyTorch, ONNX and the engines are called, and which kind of work each of them is."""

from __future__ import annotations

import re

_KINDS = {
    "convolution": """conv conv1d conv2d conv3d convolution convolutionoverrideable convtranspose convtranspose1d
        convtranspose2d convtranspose3d groupconvolution groupconvolutionbackpropdata convolutionbackpropdata
        deconvolution mkldnnconvolution""",
    "linear": """linear mm bmm addmm baddbmm matmul gemm fullyconnected fullyconnectedcompressed
        fullyconnectedquantizedlegacy dynamicquantizematmul matmultofloat matmulnbits einsum inner
        scaleddotproductattention scaleddotproductflashattentionforcpu attention multiheadattention multihead lstm gru
        rnn rnntanh rnnrelu lstmsequence grusequence rnnsequence lstmcell grucell rnncell mkldnnrnnlayer
        dynamicquantizelstm""",
    "normalization": """batchnorm batchnormalization batchnorminference batchnormlegitnotraining nativebatchnorm
        nativebatchnormlegit cudnnbatchnorm layernorm nativelayernorm layernormalization skiplayernormalization
        simplifiedlayernormalization instancenorm instancenormalization nativegroupnorm groupnorm groupnormalization
        rmsnorm rmsnormalization mvn normalize lpnormalization lrn localresponsenorm softmax logsoftmax""",
    "pooling": """avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d averagepool
        globalaveragepool avgpool maxpool maxpool1d maxpool2d maxpool3d maxpool2dwithindices adaptivemaxpool1d
        adaptivemaxpool2d globalmaxpool adaptiveavgpool adaptivemaxpool pooling mean sum amax amin reduce reducemean
        reducesum reducemax reducemin""",
    "elementwise": """relu relu6 leakyrelu prelu elu selu gelu quickgelu biasgelu silu swish mish hardswish hardsigmoid
        hardtanh sigmoid tanh exp log sqrt rsqrt pow power abs neg clip clamp clampmin clampmax add sub subtract rsub
        mul multiply div divide maximum minimum max min where select eltwise subgraph softplus erf sin cos threshold
        nativedropout""",
    "quantize": """quantizelinear dequantizelinear dynamicquantizelinear fakequantize quantizepertensor
        dequantizepertensor quantizeperchannel dequantizeperchannel""",
    "copy": """reorder reorderinput reorderoutput transpose permute reshape view flatten squeeze unsqueeze contiguous
        clone copy to toc convert cast cat concat concatenation slice slicescatter stridedslice split pad constantpadnd
        gather indexselect identity alias detach liftfresh expand tile repeat memcpyfromhost memcpytohost dropout
        memoryinput memoryoutput shape""",
}
KINDS = (*_KINDS, "other")

_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def kind(operator: str) -> str:
    """The kind of an operator, one of those of `core.interfaces.OperatorTime`.

    Args:
        operator: as PyTorch (`aten::conv2d`, `aten.conv2d.default`), ONNX (`QLinearConv`) or OpenVINO name it. One
            of a backward pass (`aten::convolution_backward`) is of the same kind as that of the forward pass.
    """
    name = re.sub(r"^(?:.*::|aten\.)", "", operator).split(".")[0]
    name = re.sub(r"(?:_dense)?_backward(?:_data)?$", "", name).replace("_", "").lower()
    bare = re.sub(r"^(?:qlinear|fused|nhwcfused|nhwc|q(?=gemm|attention))|(?:integer|integertofloat)$", "", name)
    return _KIND_OF.get(name) or _KIND_OF.get(bare) or "other"
