//! Work for the processor alone: integers with branches, and floating-point numbers. It fits into the first cache.

/// The sum of the lengths of the Collatz sequences of 1 to `count`.
pub fn collatz(count: u64) -> u64 {
    let length = |start: u64| {
        let (mut value, mut steps) = (start, 0);
        while value != 1 {
            value = if value.is_multiple_of(2) { value / 2 } else { 3 * value + 1 };
            steps += 1;
        }
        steps
    };
    (1..=count).map(length).sum()
}

/// The sum of the iterations that a grid of `side` by `side` points over the Mandelbrot set takes.
pub fn mandelbrot(side: u64) -> u64 {
    const MOST: u64 = 100;
    let iterations = |column: u64, row: u64| {
        let (cx, cy) = (3.0 * column as f64 / side as f64 - 2.0, 2.0 * row as f64 / side as f64 - 1.0);
        let (mut x, mut y, mut count) = (0.0, 0.0, 0);
        while x * x + y * y <= 4.0 && count < MOST {
            (x, y) = (x * x - y * y + cx, 2.0 * x * y + cy);
            count += 1;
        }
        count
    };
    (0..side).flat_map(|row| (0..side).map(move |column| (column, row))).map(|(c, r)| iterations(c, r)).sum()
}
