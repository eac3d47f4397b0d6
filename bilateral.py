"""The fast bilateral solver on NumPy and SciPy, for masks, depth maps or any other per-pixel target.

J. T. Barron and B. Poole, "The Fast Bilateral Solver", ECCV 2016. The solution x is smooth between pixels that are
near each other and have similar colours (W_ij is large), and close to the target t where its confidence c is high:

    minimise  smoothness / 2 * sum_ij W_ij (x_i - x_j)^2  +  sum_i c_i (x_i - t_i)^2

It is not solved for pixels but for the few occupied cells ("vertices") of a coarse grid over (row, column, luma,
chroma, chroma). Torch is not needed: `soft = bilateral.solve(mask, photo)`.

Shapes: P pixels = H * W, V vertices, K targets that share one grid.
"""

import warnings

import numpy as np
from scipy.sparse import coo_matrix, diags, identity
from scipy.sparse.linalg import cg

# ITU-R BT.601 luma and chroma, full range: RGB in [0,255] to (Y, U, V), chroma centred at 128.
RGB_TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)


class BilateralGrid:
    """The occupied cells of a grid over (row, column, luma, chroma, chroma), and their blur (section 2.1).

    guide: (H,W,3) uint8, RGB. sigma_spatial in pixels, sigma_luma and sigma_chroma in grey levels: the sides of a cell.
    The five coordinates of a cell are written as one integer key in mixed radix. Every radix is larger by one than its
    axis needs: the key plus one step along an axis is then the key of that neighbour, or no cell's key.
    """

    def __init__(self, guide, sigma_spatial=11, sigma_luma=5, sigma_chroma=5):
        guide = np.asarray(guide)
        if guide.ndim != 3 or guide.shape[2] != 3 or guide.dtype != np.uint8 or guide.size == 0:
            raise ValueError(f"guide must be a (H,W,3) uint8 RGB image, got shape {guide.shape} of {guide.dtype}")
        if not all(1e-9 <= sigma < np.inf for sigma in (sigma_spatial, sigma_luma, sigma_chroma)):
            raise ValueError("sigma_spatial, sigma_luma and sigma_chroma must be numbers of at least 1e-9")
        self.shape = height, width = guide.shape[:2]
        row, column = ((np.arange(side) / sigma_spatial).astype(np.int64) for side in (height, width))
        luma_bins, chroma_bins = int(255 / sigma_luma) + 3, int(256 / sigma_chroma) + 3  # one for rounding
        # The size of one step along (row, column, luma, u, v) in the key, the last axis fastest.
        steps = np.cumprod([1, chroma_bins, chroma_bins, luma_bins, int(column[-1]) + 2], dtype=object)[::-1]
        if steps[0] * (int(row[-1]) + 2) >= 2**63:
            raise ValueError("the grid has more cells than a 64-bit key can number: use larger sigmas")
        steps = steps.astype(np.int64)

        yuv = guide.reshape(-1, 3).astype(np.float32) @ RGB_TO_YUV.T + np.float32([0, 128, 128])  # (P,3)
        bins = (yuv / np.float32([sigma_luma, sigma_chroma, sigma_chroma])).astype(np.int64)
        key = bins @ steps[2:] + np.add.outer(row * steps[0], column * steps[1]).ravel()  # (P,)
        keys, self.pixel_vertex, pixels = np.unique(key, return_inverse=True, return_counts=True)  # (V,), (P,), (V,)
        self.vertices, self.mass = len(keys), pixels.astype(float)
        # The blur [1 2 1] along each axis, summed over the axes. The keys of neighbours differ by one step
        pairs = [np.intersect1d(keys, keys + step, assume_unique=True, return_indices=True)[1:] for step in steps]
        upper, lower = np.concatenate(pairs, axis=1)  # vertices, a pair for each edge
        one_way = coo_matrix((np.ones(len(upper)), (upper, lower)), shape=(self.vertices, self.vertices))
        self.blur = 2 * len(steps) * identity(self.vertices) + one_way + one_way.T  # (V,V)

    def splat(self, values):
        """Sum pixel values (H,W) over each vertex: (V,)."""
        return np.bincount(self.pixel_vertex, weights=np.asarray(values).ravel(), minlength=self.vertices)

    def slice(self, values):
        """The value of each pixel's vertex, from vertex values (V,): (H,W)."""
        return values[self.pixel_vertex].reshape(self.shape)

    def smoothness_matrix(self, iterations=10):
        """The Laplacian D_m - D_n B D_n of the bistochastised blur B, (V,V) sparse (section 2.2, algorithm 1)."""
        n = np.ones(self.vertices)  # then such that each row of D_n B D_n sums to the mass of its vertex
        for _ in range(iterations):
            n = np.sqrt(n * self.mass / (self.blur @ n))
        # The sums of the rows in place of the mass: equal in the limit, and a constant image then has exactly no cost
        scaled = diags(n) @ self.blur @ diags(n)
        return diags(scaled @ np.ones(self.vertices)) - scaled


def solve(target, guide, confidence=0.999, sigma_spatial=11, sigma_luma=5, sigma_chroma=5, smoothness=256,
          iterations=1000, tolerance=1e-5):  # fmt: skip
    """Smooth a target along the edges of a photograph: equation (8) of Barron and Poole 2016.

    target: (H,W), or (H,W,K) for K targets on one grid; finite. guide: (H,W,3) uint8 RGB. sigma_*: see BilateralGrid.
    confidence: one number of at least 0, or (H,W), the weight of each pixel's target; only its ratio to smoothness
        matters. Where it is 0 the solution is interpolated; where it is 0 everywhere, it is the target's mean.
    smoothness: lambda. iterations, tolerance: conjugate gradients stop at this residual, or with a RuntimeWarning.
    Returns float64 of the target's shape; it can leave the target's range by about the tolerance.
    """
    target = np.asarray(target, float)
    confidence = np.broadcast_to(np.asarray(confidence, float), np.shape(guide)[:2])
    if target.shape[:2] != np.shape(guide)[:2] or target.ndim not in (2, 3):
        raise ValueError(f"target {target.shape} and guide {np.shape(guide)} must have the same height and width")
    if not (confidence.min() >= 0 and confidence.max() < np.inf and 0 <= smoothness < np.inf):
        raise ValueError("confidence and smoothness must be finite numbers of at least 0")
    # Scaled by their largest values, so that no product leaves the range of float64
    offset, peak = float(target.min()), float(confidence.max()) or 1.0
    unit = float(target.max()) - offset or 1.0
    if not unit < np.inf:  # also refuses NaN
        raise ValueError("the target's values are not finite, or span more than float64 can hold")
    target, confidence = (target - offset) / unit, confidence / peak

    grid = BilateralGrid(guide, sigma_spatial, sigma_luma, sigma_chroma)
    data_weight = grid.splat(confidence)  # (V,)
    system = (smoothness / peak * grid.smoothness_matrix() + diags(data_weight)).tocsr()
    diagonal = system.diagonal()
    precondition = diags(1 / np.where(diagonal > 0, diagonal, 1))
    solution = np.empty(target.shape)
    for k in np.ndindex(target.shape[2:]):  # once for (H,W), K times for (H,W,K)
        right_hand_side = grid.splat(confidence * target[(..., *k)])  # (V,)
        mean = right_hand_side.sum() / data_weight.sum() if data_weight.any() else target[(..., *k)].mean()
        start = np.divide(right_hand_side, data_weight, out=np.full(grid.vertices, mean), where=data_weight > 0)
        rounding = 1e-12 * np.linalg.norm(diagonal * start)  # smaller residuals are rounding errors
        update, unconverged = cg(system, right_hand_side - system @ start, rtol=tolerance, atol=rounding,
                                 maxiter=iterations, M=precondition)  # fmt: skip
        if unconverged:
            warnings.warn(f"no convergence in {iterations} iterations: allow more", RuntimeWarning, stacklevel=2)
        solution[(..., *k)] = grid.slice(start + update)
    return solution * unit + offset
