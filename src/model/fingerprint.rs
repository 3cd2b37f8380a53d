//! What tells one model from another: a hash of everything that decides what it computes.

use blake3::Hasher;

use super::Model;
use super::linear::Linear;
use super::weights::{Ffn, HeadNorm, Layer, Mlp, Norm, Weights};

/// A hash in BLAKE3.
pub(super) type Fingerprint = blake3::Hash;

/// Changes when the meaning of a packed byte does, or the order in which they are hashed.
const WHAT: &[u8] = b"nybble model 1";

impl Model {
    /// A hash of the configuration and of the packed weights: models with the same one give the same bits, whatever their files are
    /// called, whichever kernel computes and however they store keys and values.
    ///
    /// It is computed when it is first asked for, about a second for each 2 GB of weights.
    pub fn fingerprint(&self) -> &[u8; 32] {
        self.hash().as_bytes()
    }

    pub(super) fn hash(&self) -> &Fingerprint {
        self.fingerprint.get_or_init(|| {
            let mut hash = Hash(Hasher::new());
            hash.bytes(WHAT);
            // Numbers are written so that they read back to the bit, and what the configuration gains is in it by itself.
            hash.bytes(format!("{:?} {:?} {:?}", self.config, self.ropes, self.slopes).as_bytes());
            hash.weights(&self.weights);
            hash.0.finalize()
        })
    }
}

/// Takes parts one after the other, each with its length before it, so that no two models run together to the same bytes.
struct Hash(Hasher);

impl Hash {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }

    /// Whether something is there, and what it is.
    fn optional<T>(&mut self, part: Option<&T>, hash: impl FnOnce(&mut Hash, &T)) {
        self.bytes(&[u8::from(part.is_some())]);
        if let Some(part) = part {
            hash(self, part);
        }
    }

    fn weights(&mut self, weights: &Weights) {
        // Every field by name, so that a new one cannot be forgotten.
        let Weights { embedding, projections, embedding_norm, positions, layers, output_norm, output, rope_factors } =
            weights;
        self.linear(embedding);
        self.optional(projections.as_ref(), |hash, both| both.iter().for_each(|linear| hash.linear(linear)));
        self.optional(embedding_norm.as_ref(), Hash::norm);
        self.optional(positions.as_ref(), Hash::linear);
        layers.iter().for_each(|layer| self.layer(layer));
        self.optional(output_norm.as_ref(), Hash::norm);
        self.optional(output.as_ref(), Hash::linear);
        self.optional(rope_factors.as_ref(), |hash, factors| hash.bytes(bytemuck::cast_slice(factors)));
    }

    fn layer(&mut self, layer: &Layer) {
        let Layer {
            attn_norm,
            qkv,
            q_norm,
            k_norm,
            attn_output,
            attn_post_norm,
            attn_joined_norm,
            ffn_norm,
            ffn,
            ffn_post_norm,
            ffn_joined_norm,
        } = layer;
        for norm in [attn_norm, attn_post_norm, attn_joined_norm, ffn_norm, ffn_post_norm, ffn_joined_norm] {
            self.optional(norm.as_ref(), Hash::norm);
        }
        for norm in [q_norm, k_norm] {
            self.optional(norm.as_ref(), |hash, HeadNorm { norm, width }| {
                hash.bytes(&(*width as u64).to_le_bytes());
                hash.norm(norm);
            });
        }
        self.linear(qkv);
        self.linear(attn_output);
        match ffn {
            Ffn::Dense(mlp) => self.mlp(mlp),
            Ffn::Experts { router, experts, shared } => {
                self.linear(router);
                experts.iter().for_each(|mlp| self.mlp(mlp));
                self.optional(shared.as_ref(), |hash, (mlp, gate)| {
                    hash.mlp(mlp);
                    hash.optional(gate.as_ref(), Hash::linear);
                });
            }
        }
    }

    fn mlp(&mut self, mlp: &Mlp) {
        let Mlp { up, down, width } = mlp;
        self.bytes(&(*width as u64).to_le_bytes());
        self.linear(up);
        self.linear(down);
    }

    fn norm(&mut self, norm: &Norm) {
        let Norm { weight, bias } = norm;
        self.bytes(bytemuck::cast_slice(weight));
        self.bytes(bytemuck::cast_slice(bias));
    }

    fn linear(&mut self, linear: &Linear) {
        for part in linear.parts() {
            self.bytes(format!("{} {} {:?} {:?}", part.rows(), part.columns(), part.layout(), part.gain()).as_bytes());
            for lines in part.lines() {
                self.bytes(bytemuck::cast_slice(lines));
            }
        }
        self.bytes(bytemuck::cast_slice(linear.bias()));
        self.optional(linear.order(), |hash, order| hash.bytes(bytemuck::cast_slice(order)));
    }
}
