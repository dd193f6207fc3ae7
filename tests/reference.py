"""The language model and its training once more, in plain numpy, with back-propagation written out by hand.

Nothing here is shared with the package, so that an error would have to be made twice to go unseen. The model is in
float64. Parameters are dictionaries of arrays by the names that `LanguageModel.named_parameters` gives; a tied model
has no ``head.decoder.weight``. Dropout is what masks, given by the test, multiply with.

Shapes: T time, N batch, V vocabulary, E embedding width, I and H widths of a layer, R = T x N rows,
K experts, D = K x E.
"""

from __future__ import annotations

import numpy as np

NUM_STATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 1, "lstm": 2}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# ---------------------------------------------------------------- cells: forward returns (h, c, saved)


def _rnn_forward(activation, x, h, c, Wx, Wh, bx, bh):
    new_h = activation(x @ Wx.T + bx + h @ Wh.T + bh)
    return new_h, None, (x, h, new_h)


def _rnn_backward(slope, saved, grad_h, grad_c, Wx, Wh):
    x, h, new_h = saved
    pre = grad_h * slope(new_h)
    return pre @ Wx, pre @ Wh, None, pre.T @ x, pre.T @ h, pre.sum(0), pre.sum(0)


def _lstm_forward(x, h, c, Wx, Wh, bx, bh):
    i, f, g, o = np.split(x @ Wx.T + bx + h @ Wh.T + bh, 4, axis=1)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    new_c = f * c + i * g
    return o * np.tanh(new_c), new_c, (x, h, c, i, f, g, o, new_c)


def _lstm_backward(saved, grad_h, grad_c, Wx, Wh):
    x, h, c, i, f, g, o, new_c = saved
    tanh_c = np.tanh(new_c)
    grad_c = grad_c + grad_h * o * (1 - tanh_c**2)
    pre = np.concatenate(
        [
            grad_c * g * i * (1 - i),
            grad_c * c * f * (1 - f),
            grad_c * i * (1 - g**2),
            grad_h * tanh_c * o * (1 - o),
        ],
        axis=1,
    )
    return pre @ Wx, pre @ Wh, grad_c * f, pre.T @ x, pre.T @ h, pre.sum(0), pre.sum(0)


def _gru_forward(x, h, c, Wx, Wh, bx, bh):
    xr, xz, xn = np.split(x @ Wx.T + bx, 3, axis=1)
    hr, hz, hn = np.split(h @ Wh.T + bh, 3, axis=1)
    r, z = sigmoid(xr + hr), sigmoid(xz + hz)
    n = np.tanh(xn + r * hn)
    return (1 - z) * n + z * h, None, (x, h, hn, r, z, n)


def _gru_backward(saved, grad_h, grad_c, Wx, Wh):
    x, h, hn, r, z, n = saved
    pre_n = grad_h * (1 - z) * (1 - n**2)
    pre_r = pre_n * hn * r * (1 - r)
    pre_z = grad_h * (h - n) * z * (1 - z)
    pre_x = np.concatenate([pre_r, pre_z, pre_n], axis=1)
    pre_h = np.concatenate([pre_r, pre_z, pre_n * r], axis=1)
    return (pre_x @ Wx, pre_h @ Wh + grad_h * z, None, pre_x.T @ x, pre_h.T @ h, pre_x.sum(0), pre_h.sum(0))


CELLS = {
    "rnn_tanh": (lambda *a: _rnn_forward(np.tanh, *a), lambda *a: _rnn_backward(lambda y: 1 - y**2, *a)),
    "rnn_relu": (
        lambda *a: _rnn_forward(lambda v: np.maximum(v, 0), *a),
        lambda *a: _rnn_backward(lambda y: (y > 0).astype(float), *a),
    ),
    "lstm": (_lstm_forward, _lstm_backward),
    "gru": (_gru_forward, _gru_backward),
}


# ---------------------------------------------------------------- the model


def _layer_names(i):
    return [f"encoder.layers.{i}.{part}" for part in ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias")]


def num_layers(parameters):
    return sum(name.endswith(".i2h_weight") for name in parameters)


def zero_states(cell, parameters, batch_size):
    return [
        np.zeros((batch_size, parameters[_layer_names(i)[1]].shape[1]))
        for i in range(num_layers(parameters))
        for _ in range(NUM_STATES[cell])
    ]


def encode(cell, parameters, tokens_TN, states, masks=None):
    """Hidden vectors of the last layer, the new states, and what the way back needs.

    `masks`, where given, multiply with the input of each layer; one more, for the output, is not used here.
    """
    forward, _ = CELLS[cell]
    count = NUM_STATES[cell]
    outputs_TNI = parameters["encoder.embedding.weight"][tokens_TN]
    new_states, tape = [], []
    for i in range(num_layers(parameters)):
        weights = [parameters[name] for name in _layer_names(i)]
        h, c = states[i * count], states[i * count + 1] if count == 2 else None
        if masks is not None:
            outputs_TNI = outputs_TNI * masks[i]
        hidden, saved = [], []
        for x in outputs_TNI:
            h, c, kept = forward(x, h, c, *weights)
            hidden.append(h)
            saved.append(kept)
        new_states += [h, c][:count]
        tape.append(saved)
        outputs_TNI = np.stack(hidden)
    return outputs_TNI, new_states, tape


def decoder_name(parameters):
    return "head.decoder.weight" if "head.decoder.weight" in parameters else "encoder.embedding.weight"


def _mixture(parameters, hidden_RH, latent_mask):
    """Log-priors (R, K), experts' vectors (R, K, E) and their log-probabilities (R, K, V)."""
    weight_VE = parameters[decoder_name(parameters)]
    log_priors_RK = log_softmax(hidden_RH @ parameters["head.prior.weight"].T)
    latents = np.tanh(hidden_RH @ parameters["head.latent.weight"].T + parameters["head.latent.bias"])
    latents_RKE = latents.reshape(*log_priors_RK.shape, weight_VE.shape[1])
    log_probs_RKV = log_softmax(latents_RKE * latent_mask @ weight_VE.T + parameters["head.decoder.bias"])
    return log_priors_RK, latents_RKE, log_probs_RKV


def _groups(parameters):
    """Of an adaptive softmax: size of the shortlist, and for each group its matrices, its bias and its first word."""
    num_groups = sum(name.endswith("projection.weight") for name in parameters)
    start = shortlist = parameters["head.shortlist.bias"].size - num_groups
    groups = []
    for i in range(num_groups):
        names = [f"head.groups.{i}.{part}" for part in ("projection.weight", "decoder.weight", "decoder.bias")]
        groups.append((*names, start))
        start += parameters[names[2]].size
    return shortlist, groups


def _adaptive_log_probs(parameters, hidden_RH):
    shortlist, groups = _groups(parameters)
    entries = log_softmax(hidden_RH @ parameters["head.shortlist.weight"].T + parameters["head.shortlist.bias"])
    parts = [entries[:, :shortlist]]
    for i, (projection, weight, bias, _) in enumerate(groups):
        logits_RG = hidden_RH @ parameters[projection].T @ parameters[weight].T + parameters[bias]
        parts.append(entries[:, [shortlist + i]] + log_softmax(logits_RG))
    return np.concatenate(parts, axis=1)


def _adaptive_gradients(parameters, hidden_RH, targets_R):
    shortlist, groups = _groups(parameters)
    entries = log_softmax(hidden_RH @ parameters["head.shortlist.weight"].T + parameters["head.shortlist.bias"])
    grad_entries = np.exp(entries)
    gradients, by_hidden_RH = {}, 0
    is_shortlisted = targets_R < shortlist
    grad_entries[np.flatnonzero(is_shortlisted), targets_R[is_shortlisted]] -= 1
    for i, (projection, weight, bias, start) in enumerate(groups):
        size = parameters[bias].size
        is_member = (targets_R >= start) & (targets_R < start + size)
        grad_entries[is_member, shortlist + i] -= 1
        projected_RE = hidden_RH @ parameters[projection].T
        grad_RG = np.exp(log_softmax(projected_RE @ parameters[weight].T + parameters[bias]))
        grad_RG[np.flatnonzero(is_member), targets_R[is_member] - start] -= 1
        grad_RG[~is_member] = 0
        gradients.update({weight: grad_RG.T @ projected_RE, bias: grad_RG.sum(0)})
        grad_RE = grad_RG @ parameters[weight]
        gradients[projection] = grad_RE.T @ hidden_RH
        by_hidden_RH = by_hidden_RH + grad_RE @ parameters[projection]
    gradients.update({"head.shortlist.weight": grad_entries.T @ hidden_RH, "head.shortlist.bias": grad_entries.sum(0)})
    return gradients, by_hidden_RH + grad_entries @ parameters["head.shortlist.weight"]


def sampled_loss_and_gradients(parameters, hidden_RH, targets_R, ids, expected_V):
    """Losses of a softmax over each target and the sample `ids`, their sum's gradients by name and by the vectors."""
    weight_VH, bias_V = parameters[decoder_name(parameters)], parameters["head.decoder.bias"] - np.log(expected_V)
    losses_R, by_hidden_RH = np.zeros(len(targets_R)), np.zeros_like(hidden_RH)
    by_weight, by_bias = np.zeros_like(weight_VH), np.zeros_like(bias_V)
    for r, target in enumerate(targets_R):
        choice = np.array([target, *(word for word in ids if word != target)])
        log_probs = log_softmax(weight_VH[choice] @ hidden_RH[r] + bias_V[choice])
        losses_R[r] = -log_probs[0]
        grad = np.exp(log_probs)
        grad[0] -= 1
        by_weight[choice] += np.outer(grad, hidden_RH[r])
        by_bias[choice] += grad
        by_hidden_RH[r] = grad @ weight_VH[choice]
    return losses_R, {decoder_name(parameters): by_weight, "head.decoder.bias": by_bias}, by_hidden_RH


def head_log_probs(parameters, hidden_RH, latent_mask=1.0):
    """Log-probabilities of the next word; `latent_mask` multiplies with a mixture's vectors, (R, K, E)."""
    if "head.shortlist.weight" in parameters:
        return _adaptive_log_probs(parameters, hidden_RH)
    if "head.prior.weight" in parameters:
        log_priors_RK, _, log_probs_RKV = _mixture(parameters, hidden_RH, latent_mask)
        return np.logaddexp.reduce(log_priors_RK[..., None] + log_probs_RKV, axis=1)
    return log_softmax(hidden_RH @ parameters[decoder_name(parameters)].T + parameters["head.decoder.bias"])


def head_gradients(parameters, hidden_RH, targets_R, latent_mask=1.0):
    """Gradients of the summed loss: by the head's parameters, a dictionary, and by the hidden vectors."""
    if "head.shortlist.weight" in parameters:
        return _adaptive_gradients(parameters, hidden_RH, targets_R)
    rows, decoder = np.arange(len(targets_R)), decoder_name(parameters)
    if "head.prior.weight" not in parameters:
        logits_grad_RV = np.exp(head_log_probs(parameters, hidden_RH))
        logits_grad_RV[rows, targets_R] -= 1
        gradients = {decoder: logits_grad_RV.T @ hidden_RH, "head.decoder.bias": logits_grad_RV.sum(0)}
        return gradients, logits_grad_RV @ parameters[decoder]
    log_priors_RK, latents_RKE, log_probs_RKV = _mixture(parameters, hidden_RH, latent_mask)
    log_joint_RK = log_priors_RK + log_probs_RKV[rows, :, targets_R]
    posterior_RK = np.exp(log_softmax(log_joint_RK))
    logits_grad_RKV = np.exp(log_probs_RKV)
    logits_grad_RKV[rows, :, targets_R] -= 1
    logits_grad_RKV *= posterior_RK[..., None]
    pre_RD = (logits_grad_RKV @ parameters[decoder] * latent_mask * (1 - latents_RKE**2)).reshape(len(rows), -1)
    prior_grad_RK = np.exp(log_priors_RK) - posterior_RK
    gradients = {
        decoder: np.einsum("rkv,rke->ve", logits_grad_RKV, latents_RKE * latent_mask),
        "head.decoder.bias": logits_grad_RKV.sum((0, 1)),
        "head.latent.weight": pre_RD.T @ hidden_RH,
        "head.latent.bias": pre_RD.sum(0),
        "head.prior.weight": prior_grad_RK.T @ hidden_RH,
    }
    by_hidden_RH = pre_RD @ parameters["head.latent.weight"] + prior_grad_RK @ parameters["head.prior.weight"]
    return gradients, by_hidden_RH


def log_probs(cell, parameters, tokens_TN, states):
    hidden_TNH, new_states, _ = encode(cell, parameters, tokens_TN, states)
    log_probs_RV = head_log_probs(parameters, hidden_TNH.reshape(-1, hidden_TNH.shape[-1]))
    return log_probs_RV.reshape(*tokens_TN.shape, -1), new_states


def activation_penalty(hidden_TNH, raw_TNH, num_targets, alpha, beta):
    """``alpha mean(hidden^2) + beta mean((raw[t+1] - raw[t])^2)`` over the rows that have a target, and its gradients.

    By the output of the last layer with dropout, `hidden_TNH`, and without, `raw_TNH`.
    """
    T, N, H = raw_TNH.shape
    has_target_TN1 = (np.arange(T * N) < num_targets).reshape(T, N, 1)
    hidden_TNH, pairs = hidden_TNH * has_target_TN1, max(1, num_targets - N)
    changes = (raw_TNH[1:] - raw_TNH[:-1]) * has_target_TN1[1:]
    value = alpha * (hidden_TNH**2).sum() / (num_targets * H) + beta * (changes**2).sum() / (pairs * H)
    by_raw_TNH = np.zeros_like(raw_TNH)
    by_raw_TNH[1:] += 2 * beta * changes / (pairs * H)
    by_raw_TNH[:-1] -= 2 * beta * changes / (pairs * H)
    return value, 2 * alpha * hidden_TNH / (num_targets * H), by_raw_TNH


def loss_and_gradients(
    cell,
    parameters,
    tokens_TN,
    targets_TN,
    states,
    num_targets=None,
    masks=None,
    alpha=0.0,
    beta=0.0,
    latent_mask=None,
):
    """Summed loss of the first `num_targets` rows (or all), its gradients by name, and the new states.

    The gradients are those of the loss and `num_targets` times the penalty, the loss is without it.
    """
    _, backward = CELLS[cell]
    count = NUM_STATES[cell]
    raw_TNH, new_states, tape = encode(cell, parameters, tokens_TN, states, masks)
    T, N, H = raw_TNH.shape
    output_mask = 1.0 if masks is None else masks[-1]
    hidden_TNH = raw_TNH * output_mask
    num_targets = T * N if num_targets is None else num_targets
    hidden_RH, targets_R = hidden_TNH.reshape(-1, H)[:num_targets], targets_TN.reshape(-1)[:num_targets]
    latent_mask = 1.0 if latent_mask is None else latent_mask[:num_targets]
    loss = -head_log_probs(parameters, hidden_RH, latent_mask)[np.arange(num_targets), targets_R].sum()

    gradients = {name: np.zeros_like(value) for name, value in parameters.items()}
    by_head, by_hidden_RH = head_gradients(parameters, hidden_RH, targets_R, latent_mask)
    gradients.update(by_head)
    grad_RH = np.zeros((T * N, H))
    grad_RH[:num_targets] = by_hidden_RH
    _, by_hidden_TNH, by_raw_TNH = activation_penalty(hidden_TNH, raw_TNH, num_targets, alpha, beta)
    grad_TNH = (grad_RH.reshape(T, N, H) + num_targets * by_hidden_TNH) * output_mask + num_targets * by_raw_TNH

    for i in reversed(range(num_layers(parameters))):
        names = _layer_names(i)
        Wx, Wh = parameters[names[0]], parameters[names[1]]
        grad_h, grad_c = np.zeros((N, Wh.shape[1])), np.zeros((N, Wh.shape[1])) if count == 2 else None
        grad_inputs = []
        for t in reversed(range(T)):
            grad_x, grad_h, grad_c, *by_weights = backward(tape[i][t], grad_TNH[t] + grad_h, grad_c, Wx, Wh)
            for name, value in zip(names, by_weights):
                gradients[name] += value
            grad_inputs.append(grad_x)
        grad_TNH = np.stack(grad_inputs[::-1]) * (1.0 if masks is None else masks[i])
    np.add.at(gradients["encoder.embedding.weight"], tokens_TN, grad_TNH)
    return loss, gradients, new_states


def text_loss(cell, parameters, ids, eos):
    """Summed negative log-likelihood of a text, word by word, the first one after `eos`."""
    states, previous, total = zero_states(cell, parameters, 1), eos, 0.0
    for word in ids:
        log_probs_11V, states = log_probs(cell, parameters, np.array([[previous]]), states)
        total -= log_probs_11V[0, 0, word]
        previous = word
    return total


# ---------------------------------------------------------------- training


def clipped_mean(gradients, num_targets, clip_norm):
    """Gradients of the mean loss, their common L2 norm cut to `clip_norm`, and that norm before the cut."""
    mean = {name: value / num_targets for name, value in gradients.items()}
    norm = np.sqrt(sum((value**2).sum() for value in mean.values()))
    factor = min(1.0, clip_norm / norm) if clip_norm is not None else 1.0
    return {name: factor * value for name, value in mean.items()}, norm


def published_trigger(losses, n):
    """Number t of the evaluation at which algorithm 1 of Merity et al. 2017 begins to average; None if it does not.

    In the form of their code: at evaluation t, with v_0 ... v_{t-1} in the log, if t > n and v_t > min of v_0 ...
    v_{t-n-1}.
    """
    log = []
    for t, v in enumerate(losses):
        if t > n and v > min(log[i] for i in range(t - n)):
            return t
        log.append(v)
    return None


class TwoBitCompression:
    """Gradients that reach the others in two bits an element: what everyone has after each step, in float32.

    The gradients of the first steps are sent whole. By them, each parameter's later ones are scaled with the power of
    two that brings their root mean square nearest to 1/4. Of an element, with what it has kept of it, a sender sends
    plus or minus the threshold once that is reached, and keeps the rest for later.

    Attributes
    ----------
    factors : list of float or None
        With which each parameter's gradients are multiplied; None as long as they are sent whole.
    residuals : list of list of array or None
        What each sender has kept of each parameter, scaled.
    """

    def __init__(self, threshold, num_whole_steps):
        self.threshold, self.factors, self.residuals = np.float32(threshold), None, None
        self._num_whole_steps, self._observed = num_whole_steps, []

    def reset(self):
        """Lose what was kept."""
        self.residuals = [[np.zeros_like(array) for array in arrays] for arrays in self._observed[0]]

    def reduce(self, gradients):
        """The sums of ``[sender][parameter]`` as they arrive."""
        if self.factors is None:
            self._observed.append(gradients)
            if len(self._observed) == self._num_whole_steps:
                by_parameter = zip(*(arrays for step in self._observed for arrays in step))
                squares = [np.mean(np.square(arrays, dtype=np.float64)) for arrays in by_parameter]
                self.factors = [2.0 ** round(np.log2(0.25 / np.sqrt(square))) for square in squares]
                self.reset()
            return [np.sum(arrays, axis=0, dtype=np.float64) for arrays in zip(*gradients)]
        sums = [np.zeros_like(array) for array in gradients[0]]
        for arrays, residuals in zip(gradients, self.residuals):
            for total, array, residual, factor in zip(sums, arrays, residuals, map(np.float32, self.factors)):
                residual += array * factor
                sent = self.threshold * np.clip(np.trunc(residual / self.threshold), -1, 1)
                residual -= sent
                total += sent / factor
        return sums


class SGD:
    def __init__(self, lr, weight_decay=0.0):
        self.lr, self.weight_decay = lr, weight_decay

    def update(self, parameters, gradients):
        for name, value in parameters.items():
            value -= self.lr * (gradients[name] + self.weight_decay * value)


class Adam:
    """Kingma & Ba 2015, as at the end of their section 2: epsilon is added before the bias correction."""

    def __init__(self, lr, beta1=0.9, beta2=0.999, epsilon=1e-8):
        self.lr, self.beta1, self.beta2, self.epsilon = lr, beta1, beta2, epsilon
        self.step, self.moments = 0, {}

    def update(self, parameters, gradients):
        self.step += 1
        lr = self.lr * np.sqrt(1 - self.beta2**self.step) / (1 - self.beta1**self.step)
        for name, value in parameters.items():
            first, second = self.moments.get(name, (0.0, 0.0))
            first = self.beta1 * first + (1 - self.beta1) * gradients[name]
            second = self.beta2 * second + (1 - self.beta2) * gradients[name] ** 2
            self.moments[name] = first, second
            value -= lr * first / (np.sqrt(second) + self.epsilon)
