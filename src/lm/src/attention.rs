//! Attention and its gradient on CPU, head by head, by the products of [`crate::products`].
//!
//! Queries, keys and values are read where the projections left them, and a head's scores stay in the cache: a block of
//! query positions is multiplied by the keys that it sees, weighed and multiplied by their values before the next one
//! begins. The backward pass computes the weights again. What a sequence gives depends on nothing beside it.

use std::ops::Range;

use crate::kernels;
use crate::products::{COLUMNS, Factor, Plus, Run, Sums, View, Weight, multiply, pack, turn, turn_panel};

/// How the heads of a row stand beside each other: queries, keys, values. Query heads that share a key-value head are
/// neighbours.
#[derive(Clone, Copy)]
pub(crate) struct Heads {
    /// Query heads.
    pub(crate) queries: usize,
    /// Key heads, of which there are as many as value heads.
    pub(crate) keys: usize,
    /// Width of a head.
    pub(crate) width: usize,
}

impl Heads {
    /// Width of a row.
    pub(crate) fn row(self) -> usize {
        (self.queries + 2 * self.keys) * self.width
    }

    /// Width of a row of what attention gives.
    pub(crate) fn out(self) -> usize {
        self.queries * self.width
    }

    fn query(self, head: usize) -> Range<usize> {
        head * self.width..(head + 1) * self.width
    }

    fn key(self, head: usize) -> Range<usize> {
        self.query(self.queries + head)
    }

    fn value(self, head: usize) -> Range<usize> {
        self.query(self.queries + self.keys + head)
    }

    /// Query heads that share a key-value head.
    fn sharing(self, head: usize) -> Range<usize> {
        let share = self.queries / self.keys;
        head * share..(head + 1) * share
    }
}

/// A sequence whose positions attend to each other. Its length and the width of its heads are whole groups
/// ([`Factor::GROUP`]).
#[derive(Clone, Copy)]
pub(crate) struct Sequence<'a, E> {
    /// Rows of heads.
    pub(crate) rows: &'a [E],
    pub(crate) heads: Heads,
    /// How many keys each position sees: those of the first positions.
    pub(crate) visible: &'a [usize],
}

/// Neighbouring query positions.
#[derive(Clone)]
struct Block<'a> {
    rows: Range<usize>,
    visible: &'a [usize],
    /// Keys that any of them sees: the first.
    most: usize,
    /// Room for what each of them has for each key: whole panels.
    seen: usize,
}

impl Block<'_> {
    /// Positions within the block, and how many keys any of them sees: as many neighbours as need about as many, so that
    /// of causal scores little more than what is seen is computed.
    fn runs(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        // Rows and columns of AMX's tiles.
        const STEP: usize = 32;
        let mut first = 0;
        self.visible.chunk_by(|one, other| one.div_ceil(STEP) == other.div_ceil(STEP)).map(move |run| {
            let rows = first..first + run.len();
            first = rows.end;
            (rows, run.iter().copied().max().unwrap_or_default())
        })
    }

    /// How many keys of each panel any of the positions sees.
    fn panels(&self) -> impl Iterator<Item = usize> + use<> {
        let most = self.most;
        (0..self.seen).step_by(COLUMNS).map(move |first| COLUMNS.min(most - first))
    }
}

impl<'a, E: Factor> Sequence<'a, E> {
    /// Query positions that are taken at once: so many groups of rows fit a panel when they are turned.
    const BLOCK: usize = 48 * E::GROUP;

    fn length(&self) -> usize {
        self.visible.len()
    }

    fn view(&self, rows: Range<usize>, columns: Range<usize>) -> View<'a, E> {
        View::new(self.rows, self.heads.row(), rows, columns)
    }

    fn blocks(&self) -> impl Iterator<Item = Block<'a>> + use<'a, E> {
        self.visible.chunks(Self::BLOCK).enumerate().map(|(index, visible)| {
            let first = index * Self::BLOCK;
            let most = visible.iter().copied().max().unwrap_or_default();
            Block { rows: first..first + visible.len(), visible, most, seen: most.next_multiple_of(COLUMNS) }
        })
    }

    /// What attention gives, into rows of [`Heads::out`].
    pub(crate) fn forward(&self, work: &mut Work<E>, out: &mut [E]) {
        let _run = Run::new();
        let (heads, length) = (self.heads, self.length());
        work.fit(length, heads.width);
        for head in 0..heads.keys {
            pack(Weight::Outputs(self.view(0..length, heads.key(head))), &mut work.keys);
            pack(Weight::Inputs(self.view(0..length, heads.value(head))), &mut work.values);
            for query in heads.sharing(head) {
                for block in self.blocks() {
                    self.weigh(query, &block, work);
                    work.product(&block, length, Side::Values, heads.query(query), heads.out(), out);
                }
            }
        }
    }

    /// The gradient of the rows, into rows of their shape, of that of what attention gave.
    pub(crate) fn backward(&self, gradient: &[E], work: &mut Work<E>, out: &mut [E]) {
        let _run = Run::new();
        let (heads, length) = (self.heads, self.length());
        work.fit(length, heads.width);
        for head in 0..heads.keys {
            let (keys, values) = (self.view(0..length, heads.key(head)), self.view(0..length, heads.value(head)));
            pack(Weight::Outputs(keys), &mut work.keys);
            pack(Weight::Inputs(keys), &mut work.keys_by_position);
            pack(Weight::Outputs(values), &mut work.values);
            work.of_keys.fill(0.0);
            work.of_values.fill(0.0);
            for query in heads.sharing(head) {
                for block in self.blocks() {
                    let queries = self.view(block.rows.clone(), heads.query(query));
                    let gradient = View::new(gradient, heads.out(), block.rows.clone(), heads.query(query));
                    self.weigh(query, &block, work);
                    // ∂V += Pᵀ·∂O and ∂P = ∂O·Vᵀ; then ∂Q = ∂S·K and ∂K += ∂Sᵀ·Q.
                    work.add_turned(gradient, &block, Side::Values);
                    score(gradient, &work.values, &block, &mut work.scores);
                    let (scores, weights) = work.block(&block);
                    let scale = scale(heads.width);
                    kernels::softmax_backward(scores, weights, block.seen, scale, block.visible);
                    work.product(&block, length, Side::Keys, heads.query(query), heads.row(), out);
                    work.add_turned(queries, &block, Side::Keys);
                }
            }
            work.put(Side::Keys, length, heads.key(head), heads.row(), out);
            work.put(Side::Values, length, heads.value(head), heads.row(), out);
        }
    }

    /// How much each position of a block attends to each key, into the working memory's weights.
    fn weigh(&self, query: usize, block: &Block<'_>, work: &mut Work<E>) {
        let queries = self.view(block.rows.clone(), self.heads.query(query));
        score(queries, &work.keys, block, &mut work.scores);
        let (scores, weights) = work.block(block);
        kernels::softmax(scores, weights, block.seen, scale(self.heads.width), block.visible);
    }
}

fn scale(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// Products of rows with the panels of the positions that a block sees, into the rows of its scores: what a row does not see
/// may stay as it is.
fn score<E: Factor>(rows: View<'_, E>, panels: &[E], block: &Block<'_>, scores: &mut [f32]) {
    for (run, most) in block.runs() {
        let scores = &mut scores[run.start * block.seen..];
        let rows = rows.part(run, 0..rows.width());
        let panels = panels.chunks_exact(rows.width() * COLUMNS).zip((0..most).step_by(COLUMNS));
        for (panel, first) in panels {
            let sums = Sums::Kept { rows: &mut scores[first..], stride: block.seen, fresh: true };
            multiply(rows, (panel, COLUMNS.min(most - first)), sums);
        }
    }
}

/// Which of the two things that a position shows to others.
#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}

/// Working memory of attention, for one sequence after another.
pub(crate) struct Work<E> {
    /// Panels of the keys, with the positions as outputs.
    keys: Vec<E>,
    /// The same of the keys with the positions as inputs.
    keys_by_position: Vec<E>,
    /// Of the values: by position on the way forward, and as outputs on the way back.
    values: Vec<E>,
    scores: Vec<f32>,
    weights: Vec<E>,
    sums: Vec<f32>,
    packed: Vec<E>,
    turned: Vec<E>,
    /// Gradients of the keys and the values, turned: a row for each column of the head.
    of_keys: Vec<f32>,
    of_values: Vec<f32>,
}

impl<E: Factor> Work<E> {
    pub(crate) fn new() -> Self {
        let (elements, floats) = (Vec::new, Vec::new);
        Self {
            keys: elements(),
            keys_by_position: elements(),
            values: elements(),
            scores: floats(),
            weights: elements(),
            sums: floats(),
            packed: elements(),
            turned: elements(),
            of_keys: floats(),
            of_values: floats(),
        }
    }

    /// Makes room for a sequence of `length` with heads of `width`.
    fn fit(&mut self, length: usize, width: usize) {
        let zero = E::narrow(0.0);
        let (room, wide, block) =
            (length.next_multiple_of(COLUMNS), width.next_multiple_of(COLUMNS), Sequence::<E>::BLOCK);
        self.keys.resize(room * width, zero);
        self.values.resize((room * width).max(length * wide), zero);
        self.keys_by_position.resize(length * wide, zero);
        self.scores.resize(block * room, 0.0);
        self.weights.resize(block * room, zero);
        self.packed.resize(block * room.max(wide), zero);
        self.sums.resize(room * COLUMNS, 0.0);
        self.turned.resize(wide * COLUMNS * E::GROUP, zero);
        self.of_keys.resize(width * room, 0.0);
        self.of_values.resize(width * room, 0.0);
    }

    /// A block's scores and weights.
    fn block(&mut self, block: &Block<'_>) -> (&mut [f32], &mut [E]) {
        let count = block.rows.len() * block.seen;
        (&mut self.scores[..count], &mut self.weights[..count])
    }

    /// Multiplies a block's weights by what the positions have on `side`, into `columns` of its rows of `out`.
    fn product(
        &mut self,
        block: &Block<'_>,
        length: usize,
        side: Side,
        columns: Range<usize>,
        width: usize,
        out: &mut [E],
    ) {
        let weights = View::new(&self.weights, block.seen, 0..block.rows.len(), 0..block.seen);
        let panels = match side {
            Side::Keys => &self.keys_by_position,
            Side::Values => &self.values,
        };
        for (run, most) in block.runs() {
            let out = &mut out[(block.rows.start + run.start) * width..(block.rows.start + run.end) * width];
            let weights = weights.part(run, 0..most.next_multiple_of(E::GROUP));
            for (panel, first) in panels.chunks_exact(length * COLUMNS).zip(columns.clone().step_by(COLUMNS)) {
                let sums = Sums::Rounded { so_far: None, plus: Plus::NOTHING, out, width, first };
                multiply(weights, (panel, COLUMNS.min(columns.end - first)), sums);
            }
        }
    }

    /// Adds the products of the turned `rows` of a block with its weights to the turned gradients of a side.
    fn add_turned(&mut self, rows: View<'_, E>, block: &Block<'_>, side: Side) {
        let stride = COLUMNS * E::GROUP;
        pack(Weight::Inputs(rows), &mut self.packed);
        let panels = self.packed.chunks_exact(rows.rows() * COLUMNS);
        for (panel, turned) in panels.zip(self.turned.chunks_exact_mut(COLUMNS * stride)) {
            turn_panel(panel, rows.rows(), turned);
        }
        let turned = View::new(&self.turned, stride, 0..rows.width(), 0..rows.rows());
        let weights = View::new(&self.weights, block.seen, 0..block.rows.len(), 0..block.seen);
        pack(Weight::Inputs(weights), &mut self.packed);
        let sums = match side {
            Side::Keys => &mut self.of_keys,
            Side::Values => &mut self.of_values,
        };
        let room = sums.len() / rows.width();
        let panels = self.packed.chunks_exact(rows.rows() * COLUMNS).zip(block.panels());
        for (index, (panel, columns)) in panels.enumerate() {
            let sums = Sums::Kept { rows: &mut sums[index * COLUMNS..], stride: room, fresh: false };
            multiply(turned, (panel, columns), sums);
        }
    }

    /// Turns the gradients of a side back, into `columns` of the rows of `out`.
    fn put(&mut self, side: Side, length: usize, columns: Range<usize>, width: usize, out: &mut [E]) {
        let turned = match side {
            Side::Keys => &self.of_keys,
            Side::Values => &self.of_values,
        };
        let room = turned.len() / columns.len();
        for (rows, first) in turned.chunks(COLUMNS * room).zip(columns.clone().step_by(COLUMNS)) {
            turn(rows, rows.len() / room, room, &mut self.sums);
            let sums = &self.sums[..length * COLUMNS];
            kernels::round(sums, COLUMNS, first..columns.end.min(first + COLUMNS), width, out);
        }
    }
}
