//! How far apart two computations of the same thing are. Knows no devices and no limits.

use tch::{Device, Kind, Tensor};

/// ‖got - expected‖ / ‖expected‖ in f64, wherever the two are; NaN if either has one. Where the
/// expected values are all zero it is the norm of the other.
pub(super) fn relative_distance(got: &Tensor, expected: &Tensor) -> f64 {
    let exact = |tensor: &Tensor| tensor.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    let (got, expected) = (exact(got), exact(expected));
    let distance = (got - &expected).norm().double_value(&[]);
    let scale = expected.norm().double_value(&[]);
    if scale == 0.0 { distance } else { distance / scale }
}

/// The largest |got - expected| / |expected| over a curve; infinite for curves of unequal length.
pub(super) fn curve_distance(got: &[f64], expected: &[f64]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let distances = got.iter().zip(expected).map(|(got, expected)| ((got - expected) / expected).abs());
    farthest(distances)
}

/// The largest of distances; unlike with f64::max, a NaN wins.
pub(super) fn farthest(distances: impl Iterator<Item = f64>) -> f64 {
    distances.fold(
        0.0,
        |largest: f64, distance| {
            if largest.is_nan() || distance <= largest { largest } else { distance }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_is_relative_and_of_any_dtype() {
        let expected = Tensor::from_slice(&[3f32, 4.0]);
        assert_eq!(relative_distance(&expected, &expected), 0.0);
        assert!((relative_distance(&(&expected * 1.01), &expected) - 0.01).abs() < 1e-6);
        let rounded = Tensor::from_slice(&[3f32, 4.0]).to_kind(Kind::BFloat16);
        assert_eq!(relative_distance(&rounded, &expected), 0.0);
        let zero = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        assert_eq!(relative_distance(&expected, &zero), 5.0);
    }

    #[test]
    fn what_is_no_number_is_near_nothing() {
        let broken = Tensor::from_slice(&[f32::NAN, 4.0]);
        assert!(relative_distance(&broken, &Tensor::from_slice(&[3f32, 4.0])).is_nan());
        assert!(curve_distance(&[1.0, f64::NAN, 1.0], &[1.0, 1.0, 1.0]).is_nan());
        assert_eq!(curve_distance(&[1.0], &[1.0, 1.0]), f64::INFINITY);
    }

    #[test]
    fn a_curve_is_as_far_as_its_farthest_point() {
        let distance = curve_distance(&[2.0, 4.4, 1.0], &[2.0, 4.0, 1.0]);
        assert!((distance - 0.1).abs() < 1e-12, "{distance}");
        assert_eq!(curve_distance(&[], &[]), 0.0);
    }
}
