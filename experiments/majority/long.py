"""Quick pilots: a minimal Llama on majority sequences."""
import argparse, json, math, time, sys
import numpy as np, torch, torch.nn.functional as F
from oasis_attn.data.majority import MajorityTask, _random
p = argparse.ArgumentParser()
a_ = p.add_argument
a_("--T", type=int, default=64); a_("--D", type=int, default=64); a_("--H", type=int, default=4); a_("--L", type=int, default=4)
a_("--I", type=int, default=192); a_("--steps", type=int, default=4000); a_("--B", type=int, default=8)
a_("--lr", type=float, default=5e-3); a_("--wd", type=float, default=0.1); a_("--bos", type=int, default=1)
a_("--tie", type=int, default=1); a_("--init", type=float, default=0.02); a_("--seed", type=int, default=100)
a_("--rate", type=float, default=0.12); a_("--noise", type=float, default=0.5); a_("--b2", type=float, default=0.95)
a_("--every", type=int, default=1000); a_("--words", type=int, default=64); a_("--K", type=int, default=4); a_("--theta", type=float, default=10000.)
a_("--mlp_lr", type=float, default=1.0); a_("--device", default="cpu"); a_("--seconds", type=float, default=1e9); a_("--compile", type=int, default=0)
a_("--mode", default="majority"); a_("--name", default="");a_("--follow", type=int, default=0)
o = p.parse_args()
torch.set_num_threads(1)
torch.manual_seed(o.seed)
task = MajorityTask(window=o.T + 2, rate=o.rate, noise=o.noise, class_words=o.words, classes=o.K)
rnd = _random(f"fast {o.seed}")
succ = np.argsort(rnd.random_sample(o.K * o.words), kind="stable")
V = 2 + 1 + o.K + o.K * o.words
D, H, L, I, T = o.D, o.H, o.L, o.I, o.T
d = D // H
dev = o.device
P = {}
def mk(name, *s, std=o.init):
    P[name] = torch.nn.Parameter(torch.randn(*s) * std) if std else torch.nn.Parameter(torch.ones(*s))
mk("emb", V, D)
for l in range(L):
    mk(f"{l}.n1", D, std=0); mk(f"{l}.qkv", 3 * D, D); mk(f"{l}.o", D, D)
    mk(f"{l}.n2", D, std=0); mk(f"{l}.gu", 2 * I, D); mk(f"{l}.down", D, I)
mk("nf", D, std=0)
if not o.tie: mk("head", V, D)
for k in P: P[k] = torch.nn.Parameter(P[k].detach().to(dev))
inv = 1.0 / o.theta ** (torch.arange(0, d, 2) / d)
ang = torch.outer(torch.arange(T).float(), inv); ang = torch.cat([ang, ang], -1)
cos, sin = ang.cos().to(dev), ang.sin().to(dev)
def rot(x):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin
def norm(x, g): return F.rms_norm(x, (D,), g, 1e-6)
def fwd(ids, see=None, q=None):
    x = F.embedding(ids, P["emb"]); B = len(ids)
    lin = (lambda n, h, w: F.linear(h, w)) if q is None else q
    for l in range(L):
        h = norm(x, P[f"{l}.n1"])
        qkv = lin(f"{l}.qkv", h, P[f"{l}.qkv"]).view(B, T, 3, H, d).permute(2, 0, 3, 1, 4)
        Q, K, v = rot(qkv[0]), rot(qkv[1]), qkv[2]
        if see is not None: see("att", l, (Q, K, v))
        y = F.scaled_dot_product_attention(Q, K, v, is_causal=True)
        x = x + lin(f"{l}.o", y.transpose(1, 2).reshape(B, T, D), P[f"{l}.o"])
        g, u = lin(f"{l}.gu", norm(x, P[f"{l}.n2"]), P[f"{l}.gu"]).chunk(2, -1)
        x = x + lin(f"{l}.down", F.silu(g) * u, P[f"{l}.down"])
        if see is not None: see("layer", l, x)
    return lin("head", norm(x, P["nf"]), P["emb"] if o.tie else P["head"])
NW = o.K * o.words
def draw(r, n):
    """0 BOS, 1 EOS, 2 question, 3.. answers, then words; mode: after a question comes the majority class / the word before it."""
    ids = np.empty((n, T), np.int64); counts = np.zeros((n, o.K), np.int64); word = (r.random_sample(n) * NW).astype(np.int64)
    state = np.zeros(n, np.int64)  # 0 after a word, 1 after a question, 2 after an answer
    row = np.arange(n); prev = word.copy()
    for t in range(T):
        ask, fol, cho = r.random_sample((3, n))
        nxt = np.where(fol >= o.noise, succ[word], (cho * NW).astype(np.int64))
        q = (state == 0) & (ask < o.rate) & (t >= 4)
        a = state == 1
        ans = 3 + counts.argmax(1) if o.mode == "majority" else 3 + o.K + (word if o.mode == "copy" else prev)
        ids[:, t] = np.where(q, 2, np.where(a, ans, 3 + o.K + nxt))
        new = ~(q | a)
        prev = np.where(new, word, prev)
        word = np.where(new, nxt, word)
        counts[row[new], word[new] // o.words] += 1
        state = np.where(q, 1, np.where(a, 2 if o.mode == "majority" else 0, 0))
    return ids
def batch(n, r):
    ids = draw(r, n) if o.follow else task._draw(r, succ, n) + 2
    if o.bos: ids = np.concatenate([np.zeros((n, 1), np.int64), ids[:, :-1]], 1)
    return torch.from_numpy(ids).to(dev)
groups = []
for k, w in P.items():
    mult = o.mlp_lr if (".gu" in k or ".down" in k) else 1
    groups.append({"params": [w], "weight_decay": o.wd if w.ndim > 1 else 0.0, "lr": o.lr * mult, "base": o.lr * mult})
if dev != "cpu":
    for g in groups: g["lr"] = torch.tensor(g["lr"], device=dev)
opt = torch.optim.AdamW(groups, betas=(0.9, o.b2), fused=True, capturable=dev != "cpu")
ev = batch(64, _random("fast eval")); cal = batch(16, _random("fast cal"))
@torch.no_grad()
def measure(step, t):
    sink = []; inf = []; med = []; massive = 0; where = None; first = []; detail = []
    def see(kind, l, x):
        nonlocal massive, where
        if kind == "att":
            s = (x[0] @ x[1].mT) / math.sqrt(d)
            s = s.masked_fill(torch.ones(T, T, device=dev).triu(1).bool(), -1e30).softmax(-1)
            idle = (ev != 2)[:, None, 1:].float(); 
            w = s[:, :, 1:]; dg = w[..., 1:].diagonal(dim1=-2, dim2=-1); pv = w[..., :-1].diagonal(dim1=-2, dim2=-1)
            detail.append([[round(float((m * idle).sum((0, 2))[h] / idle.sum()), 2) for m in (w[..., 0], dg, pv)] + [round(float((w[..., 0] * (1 - idle)).sum((0, 2))[h] / (1 - idle).sum()), 2)] for h in range(H)])
            sink.append([round(v, 2) for v in s[:, :, 1:, 0].mean((0, 2)).tolist()])
        else:
            a = x.abs().flatten(1); m = a.median(1).values; inf.append(round(float(a.amax(1).mean()), 1)); med.append(round(float(m.mean()), 3))
            massive += int((a > torch.maximum(torch.tensor(100., device=dev), 1000 * m)[:, None]).sum())
            first.append([round(float(x[:, 0].abs().amax(-1).mean()), 1), round(float(x[:, 1:].abs().amax((1, 2)).mean()), 1)])
    z = fwd(ev, see)
    ls = F.cross_entropy(z[:, :-1].flatten(0, 1), ev[:, 1:].flatten(), reduction="none").view(len(ev), -1)
    isa = ev[:, :-1] == 2
    acc = (z[:, :-1].argmax(-1) == ev[:, 1:])[isa].float().mean()
    # static int8 per tensor
    rng = {}
    def obs(n, h, w):
        rng[n] = (min(rng.get(n, (0, 0))[0], float(h.min())), max(rng.get(n, (0, 0))[1], float(h.max()))); return F.linear(h, w)
    fwd(cal, q=obs)
    def qa(n, h, w, bits=8):
        lo, hi = rng[n]; s = (hi - lo) / 255; zp = round(-lo / s)
        h = ((h / s).round() + zp).clamp(0, 255).sub(zp) * s
        sw = w.abs().max() / 127
        return F.linear(h, (w / sw).round() * sw)
    def q4(n, h, w):
        s = h.abs().amax(-1, keepdim=True) / 7 + 1e-12; sw = w.abs().amax(-1, keepdim=True) / 7
        return F.linear((h / s).round() * s, (w / sw).round() * sw)
    full = float(ls.mean())
    costs = [float(F.cross_entropy(fwd(ev, q=f)[:, :-1].flatten(0, 1), ev[:, 1:].flatten())) - full for f in (qa, q4)]
    print(json.dumps(dict(step=step, s=round(t), loss=round(full, 4), acc=round(float(acc), 3), other=round(float(ls[~isa].mean()), 4),
        massive=massive, inf=inf, med=med, first_other=first, ratio=round(max(i / m for i, m in zip(inf, med))), w8=round(costs[0], 4), w4=round(costs[1], 4), sink=sink, detail=detail)), flush=True)
print(json.dumps(vars(o)), flush=True)
cuda = dev != "cpu"
ps = list(P.values())
def step_of(ids):
    z = fwd(ids)
    loss = F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    opt.zero_grad(set_to_none=True); loss.backward()
    torch.nn.utils.clip_grad_norm_(ps, 1.0, foreach=True); opt.step()
warm = max(20, int(0.05 * o.steps))
def rate(step):
    f = min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, o.steps - warm))))
    for g in opt.param_groups:
        if cuda: g["lr"].fill_(g["base"] * f)
        else: g["lr"] = g["base"] * f
graph = None
if cuda:
    static = batch(o.B, rnd)
    rate(0); side = torch.cuda.Stream(); side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4): step_of(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): step_of(static)
t0 = time.time(); pool = None
for step in range(o.steps):
    if step % 64 == 0: pool = batch(64 * o.B, rnd)
    ids = pool[step % 64 * o.B:(step % 64 + 1) * o.B]
    rate(step)
    if graph is None: step_of(ids)
    else: static.copy_(ids); graph.replay()
    end = step + 1 == o.steps or time.time() - t0 > o.seconds
    if (step + 1) % o.every == 0 or end: measure(step + 1, time.time() - t0)
    if end: break
