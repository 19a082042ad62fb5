//! Where KVM sends global system interrupts: the pins of the interrupt controllers, and Hyper-V's synthetic interrupts.
//!
//! KVM takes the whole table at once (KVM_SET_GSI_ROUTING, Documentation/virt/kvm/api.rst, 4.52), so [`Routes`] has it.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_hv_sint, kvm_irq_routing_irqchip,
};
use vmm_sys_util::eventfd::EventFd;

/// Pins of the I/O APIC, which have the first numbers.
const PINS: u32 = 24;
/// Pins of the two 8259s, and of one.
const PIC_PINS: u32 = 16;
const PIC: u32 = 8;

/// A synthetic interrupt source: of which vCPU, and which of its 16.
pub type Sint = (u32, u32);

/// The routes beside those of the pins, which KVM begins with.
#[derive(Debug, Default)]
pub struct Routes(BTreeMap<Sint, (u32, EventFd)>);

impl Routes {
    /// Adds a route for `sint`, which `event` will raise; gives its number. None if there is one.
    pub fn add(&mut self, sint: Sint, event: EventFd) -> Option<u32> {
        if self.0.contains_key(&sint) {
            return None;
        }
        let gsi = (PINS..).find(|gsi| self.0.values().all(|(taken, _)| taken != gsi))?;
        self.0.insert(sint, (gsi, event));
        Some(gsi)
    }

    /// Takes the route for `sint` away: its number, and what raised it.
    pub fn remove(&mut self, sint: Sint) -> Option<(u32, EventFd)> {
        self.0.remove(&sint)
    }

    /// The whole table.
    pub fn table(&self) -> Vec<kvm_irq_routing_entry> {
        let pin = |gsi, irqchip, pin| {
            let irqchip = kvm_irq_routing_irqchip { irqchip, pin };
            (gsi, KVM_IRQ_ROUTING_IRQCHIP, kvm_irq_routing_entry__bindgen_ty_1 { irqchip })
        };
        let pics = (0..PIC_PINS).map(|gsi| match gsi < PIC {
            true => pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
            false => pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC),
        });
        let io_apic = (0..PINS).map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        let sints = self.0.iter().map(|(&(vcpu, sint), (gsi, _))| {
            let hv_sint = kvm_irq_routing_hv_sint { vcpu, sint };
            (*gsi, KVM_IRQ_ROUTING_HV_SINT, kvm_irq_routing_entry__bindgen_ty_1 { hv_sint })
        });
        let all = pics.chain(io_apic).chain(sints);
        all.map(|(gsi, type_, u)| kvm_irq_routing_entry { gsi, type_, u, ..Default::default() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_given_again_and_the_pins_stay() {
        let event = || EventFd::new(0).unwrap();
        let mut routes = Routes::default();
        let pins = routes.table();
        assert_eq!(pins.len(), 40);
        assert_eq!([(0, 2), (0, 3), (1, 2)].map(|sint| routes.add(sint, event())), [24, 25, 26].map(Some));
        assert_eq!(routes.add((0, 3), event()), None);
        assert_eq!(routes.remove((0, 3)).map(|(gsi, _)| gsi), Some(25));
        assert!(routes.remove((0, 3)).is_none());
        assert_eq!(routes.add((7, 15), event()), Some(25));
        let table = routes.table();
        assert_eq!(table.len(), 43);
        assert!(table[..40].iter().zip(&pins).all(|(a, b)| (a.gsi, a.type_) == (b.gsi, b.type_)));
    }
}
